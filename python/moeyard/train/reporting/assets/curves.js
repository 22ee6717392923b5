"use strict";
// Curves: raw values in pale, smoothed in full colour, evaluations dashed with dots.

const MARGIN = { top: 10, right: 14, bottom: 26 };
const charts = [];
const smoothing = document.getElementById("smoothing");

// Running mean over `span` values, of those that are there. It looks ahead less at the start, so that a steep start is not
// smoothed away.
function smoothed(values, span) {
  if (span <= 1) return values;
  const sums = [0];
  const counts = [0];
  values.forEach((value, i) => {
    sums.push(sums[i] + (value ?? 0));
    counts.push(counts[i] + (value === null ? 0 : 1));
  });
  const half = span >> 1;
  return values.map((_, i) => {
    const low = Math.max(i - half, 0);
    const high = Math.min(i + Math.min(half, i + (half >> 2)) + 1, values.length);
    const count = counts[high] - counts[low];
    return count ? (sums[high] - sums[low]) / count : null;
  });
}

class Chart {
  constructor(figure, spec) {
    Object.assign(this, { figure, spec, log: spec.log, cursor: null });
    this.svg = figure.querySelector("svg[tabindex]");
    this.curves = spec.curves.map((curve) => ({ ...curve, hidden: false, mx: curve.mx ?? curve.x, my: curve.my ?? curve.y }));
    this.addLegend();
    this.addLogButton();
    this.listen();
    this.smooth();
    redrawOnResize(this.svg, () => this.draw());
  }

  addLegend() {
    const legend = this.figure.querySelector(".legend");
    for (const curve of this.curves) {
      const button = document.createElement("button");
      button.type = "button";
      button.className = `key c${curve.colour % 8}`;
      button.setAttribute("aria-pressed", "true");
      button.title = "show or hide";
      const sample = make("svg", { class: "sample", viewBox: "0 0 22 8", "aria-hidden": "true" });
      sample.append(make("path", { d: "M0 4H22", class: curve.evaluation ? "line evaluation" : "line" }));
      if (curve.evaluation) sample.append(make("circle", { cx: 11, cy: 4, r: 2.5, class: "dot" }));
      const name = document.createElement("span");
      name.textContent = curve.name;
      button.append(sample, name);
      button.addEventListener("click", () => {
        curve.hidden = !curve.hidden;
        button.setAttribute("aria-pressed", String(!curve.hidden));
        this.draw();
      });
      legend.append(button);
    }
  }

  addLogButton() {
    const button = this.figure.querySelector(".log");
    const positive = this.curves.some((curve) => curve.y.some((value) => value > 0));
    this.log = this.log && positive;
    button.disabled = !positive;
    button.setAttribute("aria-pressed", String(this.log));
    button.addEventListener("click", () => {
      this.log = !this.log;
      button.setAttribute("aria-pressed", String(this.log));
      this.draw();
    });
  }

  smooth() {
    const percent = Number(smoothing.value);
    for (const curve of this.curves) {
      // A handful of evaluations are results, not noise; so is what a schedule sets.
      const span = curve.evaluation || !this.spec.noisy ? 1 : Math.round((percent / 100) * curve.my.length);
      curve.smooth = smoothed(curve.my, span);
      curve.pale = span > 1;
    }
  }

  // Lowest and highest value on view, with some air; log axes see positive values only.
  range() {
    let low = Infinity;
    let high = -Infinity;
    for (const curve of this.curves)
      if (!curve.hidden)
        for (const value of curve.y)
          if (value !== null && (value > 0 || !this.log)) {
            if (value < low) low = value;
            if (value > high) high = value;
          }
    if (low > high) return this.log ? [0.1, 1] : [0, 1];
    if (this.log) return low === high ? [low / 2, high * 2] : [low / (high / low) ** 0.04, high * (high / low) ** 0.04];
    if (this.spec.zero && low >= 0) return [0, this.spec.unit === "%" && high > 50 ? 100 : high * 1.05 || 1];
    const air = low === high ? Math.abs(low) / 10 || 1 : 0.04 * (high - low);
    return [low - air, high + air];
  }

  draw() {
    const { width, height } = this.svg.getBoundingClientRect();
    if (!width) return;
    const [low, high] = this.range();
    const ticks = this.log ? logTicks(low, high) : linearTicks(low, high, Math.max(2, Math.floor(height / 45)));
    const labels = ticks.map(tickText);
    const left = 10 + Math.max(widest(labels), widest(["step"]));
    const right = width - MARGIN.right;
    const bottom = height - MARGIN.bottom;
    const bend = this.log ? Math.log10 : (value) => value;
    const [first, last] = data.first === data.last ? [data.first - 0.5, data.last + 0.5] : [data.first, data.last];
    this.toX = (step) => left + ((step - first) / (last - first)) * (right - left);
    this.toY = (value) => bottom - ((bend(value) - bend(low)) / (bend(high) - bend(low))) * (bottom - MARGIN.top);
    this.toStep = (x) => first + ((x - left) / (right - left)) * (last - first);
    this.frame = { left, right, bottom };
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.replaceChildren(this.axes(ticks, labels, first, last), ...this.lines(), this.addCursor());
    if (this.cursor !== null) this.point(this.cursor);
  }

  axes(ticks, labels, first, last) {
    const { left, right, bottom } = this.frame;
    const group = make("g", { class: "axes" });
    ticks.forEach((tick, i) => {
      const y = this.toY(tick).toFixed(1);
      group.append(make("path", { d: `M${left} ${y}H${right}`, class: "grid-line" }));
      group.append(make("text", { x: left - 6, y, dy: "0.32em", "text-anchor": "end" }, labels[i]));
    });
    const steps = data.first === data.last ? [data.first] : linearTicks(first, last, Math.max(2, (right - left) / 90), wholeStep);
    for (const step of steps) {
      const x = this.toX(step);
      // The outermost numbers stay inside the picture.
      const anchor = x > right - 20 ? "end" : "middle";
      group.append(make("path", { d: `M${x.toFixed(1)} ${bottom}v4`, class: "axis-line" }));
      group.append(make("text", { x: anchor === "end" ? right + 8 : x, y: bottom + 17, "text-anchor": anchor }, tickText(step)));
    }
    group.append(make("text", { x: 4, y: bottom + 17 }, "step"));
    group.append(make("path", { d: `M${left} ${bottom}H${right}`, class: "axis-line" }));
    return group;
  }

  lines() {
    const drawn = [];
    for (const curve of this.curves) {
      if (curve.hidden) continue;
      const group = make("g", { class: `c${curve.colour % 8}` });
      if (curve.pale) group.append(make("path", { d: this.path(curve.x, curve.y), class: "line raw" }));
      const [x, y] = curve.pale ? [curve.mx, curve.smooth] : [curve.x, curve.y];
      group.append(make("path", { d: this.path(x, y), class: curve.evaluation ? "line evaluation" : "line" }));
      if (curve.evaluation ? x.length <= 100 : x.length === 1)
        x.forEach((step, i) => {
          if (this.drawable(y[i])) group.append(make("circle", { cx: this.toX(step), cy: this.toY(y[i]), r: x.length > 30 ? 2 : 3, class: "dot" }));
        });
      for (const step of curve.bad ?? []) {
        const mark = make("path", { d: `M${this.toX(step).toFixed(1)} 1l4 7h-8z`, class: "broken" });
        mark.append(make("title", {}, `${curve.name} is not finite at step ${numberText(step)}`));
        group.append(mark);
      }
      drawn.push(group);
    }
    return drawn;
  }

  drawable(value) {
    return value !== null && (value > 0 || !this.log);
  }

  path(x, y) {
    let text = "";
    let pen = "M";
    for (let i = 0; i < x.length; i++) {
      if (!this.drawable(y[i])) {
        pen = "M";
        continue;
      }
      text += `${pen}${this.toX(x[i]).toFixed(1)} ${this.toY(y[i]).toFixed(1)}`;
      pen = "L";
    }
    return text;
  }

  addCursor() {
    this.hair = make("path", { class: "hair", d: "" });
    return this.hair;
  }

  point(step) {
    if (!this.frame) return;
    this.cursor = step;
    const x = step === null ? null : this.toX(step).toFixed(1);
    this.hair.setAttribute("d", x === null ? "" : `M${x} ${MARGIN.top}V${this.frame.bottom}`);
  }

  // Moves the hair of every chart to a step, and reads this chart out.
  read(step, y = 100) {
    const at = Math.max(data.first, Math.min(data.last, step));
    for (const chart of charts) chart.point(at);
    const unit = this.spec.unit ? ` ${this.spec.unit}` : "";
    const lines = this.curves
      .filter((curve) => !curve.hidden && curve.x.length)
      .map((curve) => {
        const raw = numberText(curve.y[nearest(curve.x, at)]) + unit;
        const smooth = numberText(curve.smooth[nearest(curve.mx, at)]) + unit;
        return [`c${curve.colour % 8}`, curve.name, curve.pale ? `${smooth} (raw ${raw})` : raw];
      });
    showTip(this.svg, this.toX(at), y, `step ${WHOLE.format(at)}`, lines);
  }

  leave() {
    for (const chart of charts) chart.point(null);
    hideTip(this.svg);
  }

  listen() {
    const follow = (event) => {
      const box = this.svg.getBoundingClientRect();
      this.read(this.toStep(event.clientX - box.left), event.clientY - box.top);
    };
    this.svg.addEventListener("pointermove", follow);
    this.svg.addEventListener("pointerdown", follow);
    this.svg.addEventListener("pointerleave", () => this.leave());
    this.svg.addEventListener("blur", () => this.leave());
    this.svg.addEventListener("keydown", (event) => {
      const stride = Math.max(1, (data.last - data.first) / (event.shiftKey ? 10 : 100));
      const moves = { ArrowLeft: -stride, ArrowRight: stride, Home: -Infinity, End: Infinity };
      if (event.key === "Escape") this.leave();
      if (!(event.key in moves)) return;
      event.preventDefault();
      this.read((this.cursor ?? data.first) + moves[event.key]);
    });
  }
}

for (const figure of document.querySelectorAll("figure.chart")) charts.push(new Chart(figure, data.charts[figure.dataset.chart]));
for (const chart of charts) chart.draw();

smoothing.addEventListener("input", () => {
  document.getElementById("smoothed").textContent = `${smoothing.value}%`;
  for (const chart of charts) {
    chart.smooth();
    chart.draw();
  }
});
