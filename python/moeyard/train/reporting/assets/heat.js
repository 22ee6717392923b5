"use strict";
// Heat maps: one pixel per cell, scaled up; the same colours in light and dark. No tokens: hatched.

// A few cells far above the rest leave the others room on the scale: there the colour follows the root of the share.
const SPREAD = 5;

// Dark blue over green to yellow, rising evenly in lightness: also without colour vision, also in grey print.
const COLOURS = [[68, 1, 84], [65, 68, 135], [42, 120, 142], [34, 168, 132], [122, 209, 81], [253, 231, 37]];

function colourOf(part) {
  const place = Math.max(0, Math.min(1, part)) * (COLOURS.length - 1);
  const below = Math.min(Math.floor(place), COLOURS.length - 2);
  return COLOURS[below].map((value, i) => Math.round(value + (place - below) * (COLOURS[below + 1][i] - value)));
}

const sumOf = (list) => list.reduce((total, value) => total + value, 0);

// What a map shows. `share` and `text` are asked by row and column; `top` is the end of the colour scale.
const MAPS = data.usage && {
  all: () => {
    const slots = data.usage.slots.map((layer) => layer[0].map((_, e) => sumOf(layer.map((domain) => domain[e]))));
    return countMap(slots, (layer) => `layer ${layer}`);
  },
  domain: (domain) => countMap(data.usage.slots.map((layer) => layer[domain]), (layer) => `layer ${layer}`),
  layer: (layer) => countMap(data.usage.slots[layer], (domain) => data.usage.domains[domain]),
  time: (layer) => {
    const { first, last, share } = data.usage.time;
    return {
      rows: share[layer][0].length,
      columns: first.length,
      rowName: (expert) => `expert ${expert}`,
      columnName: (bin) => numberText(first[bin]),
      columnTitle: "step",
      columnRoom: 64,
      title: (expert, bin) => `expert ${expert}, steps ${WHOLE.format(first[bin])} to ${WHOLE.format(last[bin])}`,
      share: (expert, bin) => share[layer][bin][expert] * 1e-4,
      lines: (expert, bin) => [["", "of the layer's slots", percentText(share[layer][bin][expert] * 1e-4)]],
    };
  },
};

function countMap(slots, rowName) {
  const totals = slots.map(sumOf);
  const share = (row, expert) => (totals[row] ? slots[row][expert] / totals[row] : 0);
  return {
    rows: slots.length,
    columns: slots[0].length,
    rowName,
    columnName: String,
    columnTitle: "expert",
    columnRoom: 26,
    title: (row, expert) => `${rowName(row)}, expert ${expert}`,
    share,
    lines: (row, expert) => [
      ["", "of the slots", totals[row] ? percentText(share(row, expert)) : "no tokens"],
      ["", "slots", WHOLE.format(slots[row][expert])],
    ],
  };
}

function largestShare(map) {
  let top = 0;
  for (let row = 0; row < map.rows; row++) for (let column = 0; column < map.columns; column++) top = Math.max(top, map.share(row, column));
  return top;
}

class HeatMap {
  constructor(figure) {
    this.figure = figure;
    this.svg = figure.querySelector("svg[tabindex]");
    this.scroll = figure.querySelector(".scroll");
    this.kind = figure.dataset.map;
    this.map = MAPS[this.kind](Number(figure.dataset.index));
    this.cell = null;
    this.listen();
    redrawOnResize(this.scroll, () => this.draw());
  }

  draw() {
    const room = this.scroll.clientWidth;
    if (!room) return;
    const { map } = this;
    const names = Array.from({ length: map.rows }, (_, row) => map.rowName(row));
    const most = Math.min(130, room / 3);
    const left = Math.min(most, 8 + widest([map.columnTitle, ...names]));
    const least = map.columns > 1000 ? 1 : map.columns > 256 ? 3 : 4;
    const width = Math.min(Math.max((room - left - 10) / map.columns, least), 64);
    const height = this.rowHeight();
    // Labels of low rows stand out above the first one.
    const top = 4;
    this.box = { left, top, width, height, right: left + width * map.columns, bottom: top + height * map.rows };
    const size = { width: Math.ceil(this.box.right + 10), height: this.box.bottom + 20 };
    this.svg.setAttribute("viewBox", `0 0 ${size.width} ${size.height}`);
    Object.assign(this.svg.style, { width: `${size.width}px`, height: `${size.height}px` });
    this.frame = make("rect", { class: "cell-frame", width, height, visibility: "hidden" });
    this.svg.replaceChildren(...this.cells(), ...this.labels(names), this.frame);
  }

  rowHeight() {
    const { rows } = this.map;
    return this.kind === "time" ? Math.max(3, Math.min(14, Math.floor(280 / rows))) : rows > 40 ? 8 : rows > 12 ? 13 : 20;
  }

  cells() {
    const { left, top, right, bottom, width, height } = this.box;
    const { rows, columns, share } = this.map;
    const canvas = Object.assign(document.createElement("canvas"), { width: columns, height: rows });
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(columns, rows);
    const numbers = [];
    for (let row = 0; row < rows; row++)
      for (let column = 0; column < columns; column++) {
        const part = share(row, column);
        if (part > 0) pixels.data.set([...colourOf(this.bend(part)), 255], 4 * (row * columns + column));
        if (width >= 27 && height >= 16) numbers.push(this.number(row, column, part));
      }
    context.putImageData(pixels, 0, 0);
    const place = { x: left, y: top, width: right - left, height: bottom - top };
    const image = make("image", { ...place, href: canvas.toDataURL(), preserveAspectRatio: "none", class: "pixels" });
    const parts = [make("rect", { ...place, fill: "url(#hatch)" }), image];
    // Thin gaps make single cells countable, while they are large enough to have some.
    if (width >= 12 && height >= 12) {
      let lines = "";
      for (let row = 1; row < rows; row++) lines += `M${left} ${top + row * height}H${right}`;
      for (let column = 1; column < columns; column++) lines += `M${(left + column * width).toFixed(1)} ${top}V${bottom}`;
      parts.push(make("path", { d: lines, class: "gaps" }));
    }
    return [...parts, ...numbers];
  }

  number(row, column, part) {
    const { left, top, width, height } = this.box;
    const text = part === 0 ? "0" : part < 0.0005 ? "<.1" : (100 * part).toFixed(part < 0.0995 ? 1 : 0);
    const style = part === 0 ? "cell none" : this.bend(part) > 0.42 ? "cell bright" : "cell";
    return make("text", { x: left + (column + 0.5) * width, y: top + (row + 0.5) * height, dy: "0.33em", class: style }, text);
  }

  labels(names) {
    const { left, top, width, height, bottom } = this.box;
    const { columns, columnName, columnTitle, columnRoom } = this.map;
    const everyRow = height >= 11 ? 1 : wholeStep(12 / height);
    const everyColumn = width >= columnRoom ? 1 : wholeStep(columnRoom / width);
    const labels = [make("text", { x: left - 6, y: bottom + 14, class: "end" }, columnTitle)];
    names.forEach((name, row) => {
      if (row % everyRow) return;
      let short = name;
      while (short.length > 2 && widest([short]) > left - 8) short = `${short.slice(0, -2)}…`;
      const label = make("text", { x: left - 6, y: top + (row + 0.5) * height, dy: "0.33em", class: "end" }, short);
      if (short !== name) label.append(make("title", {}, name));
      labels.push(label);
    });
    for (let column = 0; column < columns; column += everyColumn)
      labels.push(make("text", { x: left + (column + 0.5) * width, y: bottom + 14, class: "middle" }, columnName(column)));
    return labels;
  }

  read(row, column) {
    const { left, top, width, height } = this.box;
    this.cell = [row, column];
    const [x, y] = [left + column * width, top + row * height];
    for (const [name, value] of Object.entries({ x, y, visibility: "visible" })) this.frame.setAttribute(name, value);
    showTip(this.svg, x + width / 2, y, this.map.title(row, column), this.map.lines(row, column));
  }

  leave() {
    this.frame?.setAttribute("visibility", "hidden");
    hideTip(this.svg);
  }

  listen() {
    const cellAt = (event) => {
      const box = this.svg.getBoundingClientRect();
      const column = Math.floor((event.clientX - box.left - this.box.left) / this.box.width);
      const row = Math.floor((event.clientY - box.top - this.box.top) / this.box.height);
      return row >= 0 && row < this.map.rows && column >= 0 && column < this.map.columns ? [row, column] : null;
    };
    const follow = (event) => {
      const cell = this.box && cellAt(event);
      if (cell) this.read(...cell);
      else this.leave();
    };
    this.svg.addEventListener("pointermove", follow);
    this.svg.addEventListener("pointerdown", follow);
    this.svg.addEventListener("pointerleave", () => this.leave());
    this.svg.addEventListener("blur", () => this.leave());
    this.svg.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
      if (event.key === "Escape") this.leave();
      if (!(event.key in moves) || !this.box) return;
      event.preventDefault();
      const [row, column] = this.cell ?? [0, 0];
      const [down, along] = this.cell ? moves[event.key] : [0, 0];
      this.read(Math.max(0, Math.min(this.map.rows - 1, row + down)), Math.max(0, Math.min(this.map.columns - 1, column + along)));
    });
  }
}

// One scale per kind of map, so that maps can be compared.
function drawScale(place, top, even, bend) {
  const bar = make("svg", { viewBox: "0 0 220 30", class: "bar", role: "img", "aria-label": `Colours: 0 to ${percentText(top)} of the slots` });
  const gradient = make("linearGradient", { id: `scale-${place.dataset.scale}` });
  COLOURS.forEach((colour, i) => gradient.append(make("stop", { offset: i / (COLOURS.length - 1), "stop-color": `rgb(${colour})` })));
  bar.append(gradient, make("rect", { x: 10, y: 2, width: 200, height: 10, fill: `url(#scale-${place.dataset.scale})` }));
  bar.append(make("text", { x: 10, y: 26, class: "middle" }, "0"));
  bar.append(make("text", { x: 210, y: 26, class: "end" }, percentText(top)));
  const x = 10 + 200 * bend(even);
  bar.append(make("path", { d: `M${x} 0V15`, class: "even" }));
  // Beside the bar where it would run into the numbers at the ends.
  const inside = x > 54 && x < 132;
  if (inside) bar.append(make("text", { x, y: 26, class: "middle" }, `even ${percentText(even)}`));
  const notes = [...(inside ? [] : [`mark: even share, ${percentText(even)}`]), ...(top > SPREAD * even ? ["root scale"] : [])];
  place.replaceChildren(bar, notes.join("; "));
}

const maps = [...document.querySelectorAll("figure.map")].map((figure) => new HeatMap(figure));
for (const place of document.querySelectorAll(".scale")) {
  const alike = maps.filter((map) => map.kind === place.dataset.scale);
  const even = 1 / data.usage.slots[0][0].length;
  // Even usage looks calm: it is never further up than the middle.
  const top = Math.max(2 * even, ...alike.map((map) => largestShare(map.map)));
  const bend = (share) => (top > SPREAD * even ? Math.sqrt(share / top) : share / top);
  for (const map of alike) map.bend = bend;
  drawScale(place, top, even, bend);
}

// Maps far below are drawn when they come near, so that a page with many opens at once.
const near = new IntersectionObserver(
  (entries) => {
    for (const entry of entries.filter((entry) => entry.isIntersecting)) {
      near.unobserve(entry.target);
      maps.find((map) => map.figure === entry.target).draw();
    }
  },
  { rootMargin: "800px" },
);
for (const map of maps) {
  if (map.figure.getBoundingClientRect().top < innerHeight) map.draw();
  else near.observe(map.figure);
}

// Paper shows everything: folds open, all maps drawn.
addEventListener("beforeprint", () => {
  for (const fold of document.querySelectorAll("details")) fold.open = true;
  for (const map of maps) map.draw();
  for (const chart of charts) chart.draw();
});

document.body.dataset.drawnMs = performance.now().toFixed(1);
