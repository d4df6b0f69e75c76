// ---- one run, and several
function tile(name, value, unit) {
  return el("div", { class: "tile" }, el("div", { class: "value" }, value, " ", el("span", { class: "unit" }, unit)), el("div", { class: "name" }, name));
}
function tiles(report) {
  const share = report.step_ms ? report.data_wait_ms / report.step_ms : 0, found = [
    tile("a step", ms(report.step_ms), "ms"),
    tile("throughput", fixed(report.samples_per_s, 0), "samples/s"),
    tile(report.facts.placement === "textbook" ? "of it for batches" : "of it waiting for batches", percent(share), `${ms(report.data_wait_ms)} ms`)];
  if (report.gain) found.push(tile("the textbook loop, in this run", `${fixed(report.gain.ratio, 2)} ×`, `[${fixed(report.gain.low, 2)}, ${fixed(report.gain.high, 2)}]`));
  else if (report.ceilings.length) found.push(tile(`of the step is its ceiling: ${report.ceilings[0].name}`, percent(Math.min(report.ceilings[0].step_ms / report.step_ms, 1)), `${ms(report.ceilings[0].step_ms)} ms`));
  return el("div", { class: "tiles" }, ...found);
}
function overTime(report) {
  const series = report.series, perSecond = series.step_ms.map((each) => (each ? 1000 / each : 0));
  return el("section", {}, el("div", { class: "columns" },
    timeChart(report, [{ name: "the whole step", values: series.step_ms, color: "var(--step)" },
      { name: "waiting for a batch, or making it", values: series.data_wait_ms, color: "var(--wait)" }], "A step over the run", "Milliseconds a step, over seconds of training.", true),
    timeChart(report, [{ name: "", values: perSecond, color: "var(--step)" }], "Throughput over the run", "Steps a second, over seconds of training.", false)));
}
function details(report) {
  const facts = Object.entries(report.facts).map(([name, value]) => [name, typeof value === "number" ? fixed(value, Number.isInteger(value) ? 0 : 2) : value === null ? "–" : String(value)]);
  const settings = Object.entries(report.settings).map(([name, value]) => [name, JSON.stringify(value)]);
  return el("details", {}, el("summary", {}, "What ran, and its settings"), el("div", { class: "columns" }, table(["", ""], facts, 2), table(["", ""], settings, 2)));
}
function showRun(name, report) {
  const facts = report.facts, parts = [
    el("p", { class: "kicker" }, `${name} · batches made in ${facts.placement} on ${facts.device} · ${fixed(facts.num_steps, 0)} steps · ${facts.ended}`),
    el("h1", {}, report.verdict),
    el("p", { class: "next" }, el("b", {}, "Change next: "), report.advice || "nothing"),
    tiles(report)];
  if (report.gain) parts.push(section("Gain, measured in this run", "Short windows of the textbook loop and of this one took turns, in random order, on the same data and with the same numbers. The bar is the 95 % interval.", gainChart(report)));
  if (report.stages.length) parts.push(section("Where a step goes", "Milliseconds a step, by thread and stage. What a thread beside the loop does is hidden as far as the loop does not wait for it.", stackedThreads(report), stageTable(report)));
  if (report.ceilings.length) parts.push(el("section", {}, el("div", { class: "columns" }, ceilingChart(report), predictionChart(report))));
  const isSampled = report.lanes.some((lane) => lane.kind === "states");
  if (report.lanes.length) parts.push(section("Lanes", isSampled
    ? "The last moments of the run, thread by thread: the stage above, and below it whether the thread held the GIL. Scroll to zoom, drag to move."
    : "The last moments of the run, thread by thread. Scroll to zoom, drag to move. Trainer(gil=\"account\") shades who holds the GIL.", laneChart(report)));
  if (report.series.at_s.length > 1) parts.push(overTime(report));
  const notes = report.notes.length ? el("ul", {}, ...report.notes.map((note) => el("li", {}, note))) : null;
  parts.push(el("section", {}, el("h2", {}, "Notes"), notes, details(report)));
  return parts;
}
function compareRuns(shown, show) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.report.settings)))];
  const differing = names.filter((name) => name !== "run_dir" && new Set(runs.map((run) => JSON.stringify(run.report.settings[name]))).size > 1);
  const metrics = ["train/epoch_loss", "train/loss", "val/loss", "val/accuracy"].filter((name) => runs.some((run) => name in run.report.metrics));
  const head = ["run", "where", ...differing, "ms a step", "samples/s", "waiting", "ceiling", ...metrics];
  const body = runs.map((run, number) => {
    const report = run.report, row = [run.name, report.facts.placement,
      ...differing.map((name) => JSON.stringify(report.settings[name]) ?? "–"), ms(report.step_ms), fixed(report.samples_per_s, 0),
      percent(report.step_ms ? report.data_wait_ms / report.step_ms : 0), report.ceilings.length ? report.ceilings[0].name : "–",
      ...metrics.map((name) => (name in report.metrics && report.metrics[name] !== null ? report.metrics[name].toPrecision(4) : "–"))];
    const line = el("tr", { class: `pick ${number === shown ? "picked" : ""}` }, ...row.map((text, column) => el("td", column < 2 + differing.length ? { class: "text" } : {}, text)));
    line.addEventListener("click", () => show(number));
    return line;
  });
  const heads = head.map((text, column) => el("th", column < 2 + differing.length ? { class: "text" } : {}, text));
  const rows = runs.map((run) => ({ name: run.name.length > 30 ? "…" + run.name.slice(-29) : run.name, value: run.report.step_ms, low: run.report.step_ms, high: run.report.step_ms,
    color: "var(--accent)", text: ms(run.report.step_ms), tip: `${run.name}: ${ms(run.report.step_ms)} ms a step` }));
  const best = Math.min(...runs.map((run) => run.report.step_ms));
  return section(`${runs.length} runs`, "Click a line to see that run below. Settings are shown where they differ.",
    el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...body))),
    el("div", { style: "margin-top:18px" }, bars(rows, best, `best ${ms(best)}`, 1040, 210)));
}
function show(number) {
  const parts = runs.length > 1 ? [compareRuns(number, show)] : [];
  const page = document.getElementById("page");
  page.replaceChildren(...parts, ...showRun(runs[number].name, runs[number].report),
    el("footer", {}, "Drawn from report.json beside this page; trace.json opens at ui.perfetto.dev and in chrome://tracing."));
  page.dataset.drawn = "yes";
}
show(0);
