"use strict";
// Draws the page from the JSON in it. Everything is SVG and plain HTML; nothing is loaded from anywhere.
const runs = JSON.parse(document.getElementById("runs").textContent);
const SVG = "http://www.w3.org/2000/svg";
const COLORS = {
  data_wait: "wait", forward: "forward", backward: "backward", optimizer: "optimizer", log: "log", callbacks: "put", between: "put", fetch: "fetch",
  collate: "collate", transfer: "transfer", put: "put", step: "step", held: "held", waiting: "waiting",
  native: "native", blocked: "blocked", device: "device", loop: "forward", gil: "held", host: "fetch", belt: "transfer", serial: "wait",
  prefetch: "fetch", writer: "log", validate: "native", checkpoint: "transfer", setup: "put",
};
const MEANS = {
  data_wait: "waiting for a batch", put: "belt full: waiting for room", step: "forward to log", held: "holds the GIL",
  waiting: "waits for the GIL", native: "runs without it", blocked: "asleep",
};
const color = (name) => `var(--${COLORS[name] || (name.startsWith("worker") ? "collate" : "device")})`;
const fixed = (value, digits) => value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const ms = (value) => (value >= 100 ? fixed(value, 0) : value >= 10 ? fixed(value, 1) : fixed(value, 2));
const percent = (ratio) => (ratio === null || ratio === undefined ? "–" : `${fixed(100 * ratio, 0)} %`);

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
const tip = (text) => svg("title", {}, text);
const canvas = (width, height, cls = "") => svg("svg", { viewBox: `0 0 ${width} ${height}`, class: cls, role: "img" });
const label = (x, y, text, attributes = {}) => svg("text", { x, y, ...attributes }, text);

function ticks(high, count = 5) {
  const rough = (high || 1) / count, power = 10 ** Math.floor(Math.log10(rough));
  const each = [1, 2, 5, 10].map((by) => by * power).find((by) => by >= rough);
  return Array.from({ length: Math.floor(high / each + 1e-9) + 1 }, (_, number) => +(number * each).toPrecision(6));
}
function xAxis(chart, x, high, top, bottom, unit) {
  for (const tick of ticks(high)) {
    chart.append(svg("line", { x1: x(tick), x2: x(tick), y1: top, y2: bottom, class: "grid" }));
    chart.append(label(x(tick), bottom + 16, `${tick}${tick ? "" : " " + unit}`, { class: "soft", "text-anchor": "middle" }));
  }
}
function legend(names) {
  return el("div", { class: "legend" }, ...names.map((name) =>
    el("span", {}, el("i", { style: `background:${color(name)}` }), MEANS[name] ? `${name}: ${MEANS[name]}` : name)));
}
function section(title, hint, ...children) {
  return el("section", {}, el("h2", {}, title), el("p", { class: "hint" }, hint), ...children);
}

// ---- where a step goes
function stackedThreads(report) {
  const rows = new Map();
  for (const line of report.stages) rows.set(line.thread, [...(rows.get(line.thread) || []), line]);
  if (report.cost && report.cost.device_ms) rows.set("device", [{ stage: "device", step_ms: report.cost.device_ms, core_ratio: 0 }]);
  const sums = [...rows.values()].map((lines) => lines.reduce((sum, line) => sum + line.step_ms, 0));
  const high = Math.max(report.step_ms, ...sums) * 1.02, width = 1040, left = 86;
  const height = rows.size * 34 + 30, x = (value) => left + (value / high) * (width - left - 8);
  const chart = canvas(width, height);
  xAxis(chart, x, high, 0, height - 26, "ms a step");
  [...rows].forEach(([thread, lines], row) => {
    chart.append(label(left - 10, row * 34 + 21, thread, { "text-anchor": "end" }));
    let at = 0;
    for (const line of lines) {
      const wide = x(at + line.step_ms) - x(at);
      const bar = svg("rect", { x: x(at), y: row * 34 + 5, width: Math.max(wide, 0.3), height: 24, fill: color(line.stage), class: "bar" });
      bar.append(tip(`${thread}, ${line.stage}: ${ms(line.step_ms)} ms a step`));
      chart.append(bar);
      if (wide > 74 && line.stage !== "put") {
        chart.append(label(x(at) + 7, row * 34 + 21, `${line.stage} ${ms(line.step_ms)}`, { style: "fill:#fff" }));
      }
      at += line.step_ms;
    }
  });
  const seen = [...new Set(report.stages.filter((line) => line.step_ms > 0.0005).map((line) => line.stage))];
  return el("div", {}, chart, legend(seen));
}
function stageTable(report) {
  const head = ["thread", "stage", "ms a step", "on a core", "holds the GIL", "waits for the GIL", "hidden"];
  const rows = report.stages.filter((line) => line.step_ms >= 0.0005).map((line) => [
    line.thread, line.stage, fixed(line.step_ms, 3), percent(line.core_ratio), percent(line.held_ratio),
    percent(line.waiting_ratio), percent(line.hidden_ratio)]);
  return table(head, rows, 2);
}
function table(head, rows, numText) {
  const cell = (tag) => (text, column) => el(tag, column < numText ? { class: "text" } : {}, text);
  return el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ...head.map(cell("th")))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map(cell("td")))))));
}

// ---- ceilings and predictions
function bars(rows, marked, markName, width = 500, left = 74) {
  const high = Math.max(marked, ...rows.map((row) => row.high)) * 1.16;
  const height = rows.length * 30 + 44, x = (value) => left + (value / high) * (width - left - 10);
  const chart = canvas(width, height);
  xAxis(chart, x, high, 16, height - 24, "ms");
  chart.append(svg("line", { x1: x(marked), x2: x(marked), y1: 14, y2: height - 24, class: "mark" }));
  rows.forEach((row, number) => {
    const y = 20 + number * 30;
    chart.append(label(left - 10, y + 16, row.name, { "text-anchor": "end" }));
    const bar = svg("rect", { x: x(0), y: y + 3, width: x(row.value) - x(0), height: 18, rx: 2, fill: row.color, opacity: row.opacity || 1, class: "bar" });
    bar.append(tip(row.tip));
    chart.append(bar);
    if (row.high - row.low > 0.01 * row.high) {
      chart.append(svg("path", { d: `M${x(row.low)} ${y + 12}H${x(row.high)}M${x(row.low)} ${y + 7}v10M${x(row.high)} ${y + 7}v10`, stroke: "var(--ink)", fill: "none" }));
    }
    chart.append(label(x(Math.max(row.value, row.high)) + 6, y + 16, row.text, { class: "over" }));
  });
  chart.append(label(x(marked), 9, markName, { "text-anchor": x(marked) > width - 90 ? "end" : "middle" }));
  return chart;
}
const BOUNDS = {
  device: "the device's own work", loop: "the loop thread's own work, one thing after the other",
  gil: "time that this process holds the GIL", host: "all host work over the cores", belt: "making the batches",
  serial: "making a batch, then training on it",
};
function ceilingChart(report) {
  const rows = report.ceilings.map((each, number) => ({
    name: each.name, value: each.step_ms, low: each.step_ms, high: each.step_ms, color: color(each.name),
    opacity: number ? 0.75 : 1, text: ms(each.step_ms) + (number ? "" : " binds"), tip: `${BOUNDS[each.name]}: ${ms(each.step_ms)} ms a step` }));
  return el("div", {}, section0("Ceilings", report.ceilings[0].step_ms > report.step_ms
    ? "Estimated from single moments of the run: a bar beyond the line, the mean of all steps, is the estimate's error."
    : "Steps are no shorter, on average, than the longest bar. The line is the step as it was."),
    bars(rows, report.step_ms, `measured ${ms(report.step_ms)}`));
}
function predictionChart(report) {
  const rows = report.predictions.map((each) => ({
    name: each.where, value: each.step_ms, low: each.low_ms, high: each.high_ms,
    color: each.where === report.facts.placement ? "var(--accent)" : "var(--log)",
    text: each.high_ms - each.low_ms > 0.01 * each.high_ms ? `${ms(each.low_ms)}–${ms(each.high_ms)}` : ms(each.step_ms),
    tip: `${each.where}: predicted ${ms(each.low_ms)} to ${ms(each.high_ms)} ms a step` }));
  return el("div", {}, section0("Predicted by placement", "From the same figures; blue is what ran. A range says what is not known: how much of the fetch holds the GIL."),
    bars(rows, report.step_ms, `measured ${ms(report.step_ms)}`));
}
const section0 = (title, hint) => el("div", {}, el("h2", {}, title), el("p", { class: "hint" }, hint));
