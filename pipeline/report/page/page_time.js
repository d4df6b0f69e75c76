// ---- gain
function gainChart(report) {
  const gain = report.gain, possible = gain.textbook_ms / gain.headspace_ms;
  const width = 1040, left = 20, low = Math.min(0.9, gain.low * 0.97), high = Math.max(possible, gain.high, 1.05) * 1.05;
  const x = (value) => left + ((value - low) / (high - low)) * (width - 2 * left), chart = canvas(width, 96);
  chart.append(svg("line", { x1: x(low), x2: x(high), y1: 52, y2: 52, class: "grid" }));
  for (const [at, name] of [[1, "textbook 1.00"], [possible, `batches already there ${fixed(possible, 2)}`]]) {
    chart.append(svg("line", { x1: x(at), x2: x(at), y1: 30, y2: 74, class: "mark" }));
    chart.append(label(x(at), 90, name, { class: "soft", "text-anchor": x(at) > width - 120 ? "end" : x(at) < 90 ? "start" : "middle" }));
  }
  const whole = gain.low <= 1 && gain.high >= 1 ? "var(--log)" : gain.low > 1 ? "var(--good)" : "var(--waiting)";
  chart.append(svg("line", { x1: x(gain.low), x2: x(gain.high), y1: 52, y2: 52, stroke: whole, "stroke-width": 6, "stroke-linecap": "round" }));
  chart.append(svg("circle", { cx: x(gain.ratio), cy: 52, r: 8, fill: whole, stroke: "var(--card)", "stroke-width": 2, class: "bar" }));
  chart.append(label(x(gain.ratio), 22, `${fixed(gain.ratio, 2)} × [${fixed(gain.low, 2)}, ${fixed(gain.high, 2)}]`, { "text-anchor": "middle", style: "font-weight:620;font-size:14px" }));
  return chart;
}

// ---- over time
function timeChart(report, values, name, unit, fill) {
  const series = report.series, width = 500, height = 170, left = 46, bottom = height - 26;
  const sorted = [...values[0].values].sort((a, b) => a - b);
  const high = Math.min(sorted[sorted.length - 1], 3 * sorted[Math.floor(0.98 * (sorted.length - 1))]) * 1.1 || 1;
  const last = series.at_s[series.at_s.length - 1] || 1;
  const x = (at) => left + (at / last) * (width - left - 8), y = (value) => bottom - (Math.min(value, high) / high) * (bottom - 10);
  const chart = canvas(width, height);
  for (const tick of ticks(high, 4)) {
    chart.append(svg("line", { x1: left, x2: width - 8, y1: y(tick), y2: y(tick), class: "grid" }));
    chart.append(label(left - 7, y(tick) + 4, String(tick), { class: "soft", "text-anchor": "end" }));
  }
  for (const tick of ticks(last).slice(1)) chart.append(label(x(tick), height - 8, `${tick} s`, { class: "soft", "text-anchor": "middle" }));
  for (const each of values) {
    let path = "", before = 0;
    each.values.forEach((value, number) => {
      path += `${number ? "H" + x(before) + "V" : "M" + x(0) + " "}${y(value)}`;
      before = series.at_s[number];
    });
    path += `H${x(last)}`;
    if (fill) chart.append(svg("path", { d: `${path}V${bottom}H${x(0)}Z`, fill: each.color, opacity: 0.9, class: "line" }));
    else chart.append(svg("path", { d: path, fill: "none", stroke: each.color, "stroke-width": 1.5, class: "line" }));
  }
  return el("div", {}, section0(name, unit), chart, el("div", { class: "legend" }, ...values.filter((each) => each.name).map((each) =>
    el("span", {}, el("i", { style: `background:${each.color}` }), each.name))));
}

// ---- lanes
function laneChart(report) {
  const names = [...new Set(report.lanes.map((lane) => lane.name))], width = 1040, left = 118, right = 8;
  const rows = [];
  let top = 6;
  for (const name of names) {
    const of = report.lanes.filter((lane) => lane.name === name);
    const stages = of.find((lane) => lane.kind === "stages"), states = of.find((lane) => lane.kind === "states");
    rows.push({ name, top, stages, states, height: states && stages ? 34 : 24 });
    top += (states && stages ? 34 : 24) + 10;
  }
  const height = top + 22, end = Math.max(...report.lanes.flatMap((lane) => lane.segments.map((each) => each[2])));
  const span = Math.min(Math.max(report.step_ms * 14, 1), end);
  // Begin at a step: the lanes also have what came after the last one, where the loop has nothing to show.
  const steps = report.lanes.filter((lane) => lane.name === "loop" && lane.kind === "stages").flatMap((lane) => lane.segments)
    .filter((each) => !["setup", "between", "checkpoint", "validate"].includes(each[0]));
  const shown = steps[Math.max(0, Math.min(Math.floor(0.45 * steps.length), steps.findIndex((each) => each[1] >= steps[steps.length - 1][2] - span)))];
  let from = Math.max(0, Math.min(shown ? shown[1] : 0, end - span)), to = from + span;
  const chart = canvas(width, height, "lanes"), inner = svg("g");
  const clip = svg("clipPath", { id: "lanes" }, svg("rect", { x: left, y: 0, width: width - left - right, height }));
  for (const row of rows) chart.append(label(left - 10, row.top + 16, row.name, { "text-anchor": "end" }));
  chart.append(clip, inner);
  const owners = [...new Set(report.lanes.filter((lane) => lane.name === "GIL held by").flatMap((lane) => lane.segments.map((each) => each[0])))];
  const ownerColor = (what) => (COLORS[what] ? color(what) : `hsl(${20 + 67 * owners.indexOf(what)} 45% 50%)`);
  const hue = (row, what) => (row.name === "GIL held by" ? ownerColor(what) : row.name === "device" ? "var(--device)" : color(what));
  const x = (at) => left + ((at - from) / (to - from)) * (width - left - right);
  function strip(row, segments, y, high, isState) {
    for (const [what, begin, stop] of segments) {
      if (stop < from || begin > to) continue;
      const box = svg("rect", { x: x(begin), y, width: Math.max(x(stop) - x(begin) - 0.3, 0.4), height: high,
        fill: hue(row, what), class: `segment ${what}` });
      box.append(tip(`${row.name}: ${what}, ${ms(stop - begin)} ms${isState || MEANS[what] ? ` (${MEANS[what] || ""})` : ""}`));
      inner.append(box);
    }
  }
  function draw() {
    inner.replaceChildren();
    inner.setAttribute("clip-path", "url(#lanes)");
    for (const tick of ticks(to - from, 8)) {
      inner.append(svg("line", { x1: x(from + tick), x2: x(from + tick), y1: 0, y2: top, class: "grid" }));
      inner.append(label(x(from + tick) + 3, top + 14, `${tick} ms`, { class: "soft" }));
    }
    for (const row of rows) {
      if (row.stages) strip(row, row.stages.segments, row.top, 22, false);
      if (row.states) strip(row, row.states.segments, row.top + (row.stages ? 24 : 0), row.stages ? 9 : 22, true);
    }
  }
  function show(begin, length) {
    const long = Math.min(Math.max(length, 0.05), end || 1);
    from = Math.min(Math.max(begin, 0), Math.max(end - long, 0));
    to = from + long;
    draw();
  }
  const zoom = (by, at = 0.5) => show(from + (to - from) * at * (1 - by), (to - from) * by);
  let grabbed = null;
  chart.addEventListener("wheel", (event) => {
    const box = chart.getBoundingClientRect(), scale = width / box.width;
    const at = ((event.clientX - box.left) * scale - left) / (width - left - right);
    event.preventDefault();
    zoom(event.deltaY > 0 ? 1.25 : 0.8, Math.min(Math.max(at, 0), 1));
  }, { passive: false });
  chart.addEventListener("pointerdown", (event) => {
    grabbed = { x: event.clientX, from };
    chart.setPointerCapture(event.pointerId);
    chart.classList.add("dragging");
  });
  chart.addEventListener("pointermove", (event) => {
    if (!grabbed) return;
    const scale = width / chart.getBoundingClientRect().width;
    show(grabbed.from - (((event.clientX - grabbed.x) * scale) / (width - left - right)) * (to - from), to - from);
  });
  chart.addEventListener("pointerup", () => { grabbed = null; chart.classList.remove("dragging"); });
  draw();
  const button = (text, action) => { const node = el("button", { type: "button" }, text); node.addEventListener("click", action); return node; };
  const tools = el("div", { class: "tools" }, button("closer", () => zoom(0.5)), button("wider", () => zoom(2)), button("all", () => show(0, end)));
  const seen = [...new Set(report.lanes.filter((lane) => lane.name !== "GIL held by" && lane.name !== "device").flatMap((lane) => lane.segments.map((each) => each[0])))];
  const holders = el("div", { class: "legend" }, "GIL held by", ...owners.slice(0, 8).map((name) =>
    el("span", {}, el("i", { style: `background:${ownerColor(name)}` }), name)));
  return el("div", {}, tools, chart, legend(seen.filter((name) => COLORS[name])), owners.length ? holders : null);
}
