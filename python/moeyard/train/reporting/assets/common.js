"use strict";
// What curves and heat maps share: SVG elements, numbers, ticks, the read-out.

// A fault must be seen, not guessed at from a white page.
addEventListener("error", (event) => {
  document.body.dataset.fault = event.message;
  const line = document.createElement("p");
  line.className = "problems";
  line.textContent = `The script of this page failed: ${event.message}`;
  document.body.prepend(line);
});

const data = JSON.parse(document.getElementById("data").textContent);
const SPACE = document.getElementById("shared").namespaceURI;

function make(tag, attributes = {}, text = undefined) {
  const element = document.createElementNS(SPACE, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

// Four significant digits; thousands separated; powers of ten where zeros would have to be counted.
function numberText(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1e9 || (size > 0 && size < 1e-3)) return value.toExponential(2).replace("e+", "e");
  return size >= 1000 ? WHOLE.format(value) : String(Number(value.toPrecision(4)));
}

function tickText(value) {
  const size = Math.abs(value);
  if (size >= 1e7 || (size > 0 && size < 1e-3)) return String(Number(value.toPrecision(3)).toExponential()).replace("e+", "e");
  return size >= 1000 ? WHOLE.format(value) : String(Number(value.toPrecision(6)));
}

const percentText = (share) => `${(100 * share).toFixed(share > 0 && share < 0.001 ? 2 : 1)}%`;

// 1, 2, 2.5 or 5 times a power of ten, at or above `rough`; whole numbers have no 2.5.
function niceStep(rough, factors = [1, 2, 2.5, 5, 10]) {
  const power = 10 ** Math.floor(Math.log10(rough));
  return power * factors.find((factor) => factor * power >= rough * (1 - 1e-9));
}

const wholeStep = (rough) => niceStep(Math.max(rough, 1), [1, 2, 5, 10]);

function linearTicks(low, high, count, round = niceStep) {
  const step = round((high - low) / count);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) ticks.push(i * step);
  return ticks;
}

function logTicks(low, high) {
  const from = Math.floor(Math.log10(low));
  const to = Math.ceil(Math.log10(high));
  const decades = Math.log10(high / low);
  const factors = decades > 3 ? [1] : decades > 1.2 ? [1, 2, 5] : [1, 1.5, 2, 3, 5, 7];
  const every = Math.ceil((to - from) / 8);
  const ticks = [];
  for (let power = from; power <= to; power += every)
    for (const factor of factors) {
      const tick = factor * 10 ** power;
      if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
    }
  return ticks.length > 1 ? ticks : linearTicks(low, high, 4).filter((tick) => tick > 0);
}

// How wide a text is in the pictures, in pixels.
const pen = document.createElement("canvas").getContext("2d");
pen.font = `12px ${getComputedStyle(document.body).fontFamily}`;
const widest = (texts) => Math.max(0, ...texts.map((text) => pen.measureText(text).width));

// The position in a rising list that is nearest to `value`.
function nearest(list, value) {
  let low = 0;
  let high = list.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (list[middle] < value) low = middle;
    else high = middle;
  }
  return value - list[low] <= list[high] - value ? low : high;
}

// The read-out beside a point of a picture, kept inside its figure. `lines` are [colour class, name, value].
function showTip(svg, x, y, title, lines) {
  const figure = svg.closest("figure");
  const [outer, inner] = [figure.getBoundingClientRect(), svg.getBoundingClientRect()];
  const tip = figure.querySelector(".tip");
  const head = document.createElement("strong");
  head.textContent = title;
  const rows = lines.map(([colour, name, value]) => {
    const row = document.createElement("div");
    const dot = document.createElement("i");
    dot.className = colour;
    const label = document.createElement("span");
    label.textContent = name;
    const text = document.createElement("b");
    text.textContent = value;
    row.append(...(colour ? [dot] : []), label, text);
    return row;
  });
  tip.replaceChildren(head, ...rows);
  tip.hidden = false;
  const [middle, room] = [x + inner.left - outer.left, outer.width - tip.offsetWidth];
  const left = middle + 14 > room ? middle - 14 - tip.offsetWidth : middle + 14;
  tip.style.left = `${Math.max(0, Math.min(left, room))}px`;
  tip.style.top = `${Math.max(0, y + inner.top - outer.top - tip.offsetHeight / 2)}px`;
}

const hideTip = (svg) => {
  svg.closest("figure").querySelector(".tip").hidden = true;
};

// Redraws when the width changes, which is also when a fold opens; several changes in one frame are one.
function redrawOnResize(element, draw) {
  const measure = () => Math.round(element.getBoundingClientRect().width);
  let width = measure();
  new ResizeObserver(() => {
    if (measure() === width) return;
    width = measure();
    if (width) requestAnimationFrame(draw);
  }).observe(element);
}
