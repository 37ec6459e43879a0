"use strict";
// Draws the page from the JSON in it (page_data.py). Text goes into the page by textContent alone.
const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs, several = runs.length > 1;

// ---- elements ----------------------------------------------------------------------------------------------------
function el(tag, options, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(options || {})) {
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  for (const child of children.flat(2)) if (child !== null && child !== undefined) node.append(child);
  return node;
}
function svg(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}
const colour = (i) => `var(--c${i % 7})`;
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "5 2", "1 2", "12 4"];
const isNumber = (x) => typeof x === "number" && isFinite(x);

// ---- numbers -----------------------------------------------------------------------------------------------------
function short(x, share) {
  if (!isNumber(x)) return "–";
  if (share) return `${(100 * x).toFixed(1)} %`;
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 1000 || (size >= 100 && Number.isInteger(x))) return Math.round(x).toLocaleString("en");
  if (size < 0.001) return x.toExponential(1);
  return x.toFixed(size >= 100 ? 1 : size >= 10 ? 2 : 3);
}
function tick(x, share) {
  if (share) return `${Number((100 * x).toPrecision(4))} %`;
  const size = Math.abs(x);
  return size >= 1e4 ? x.toLocaleString("en") : size && size < 0.001 ? x.toExponential(1) : String(Number(x.toPrecision(4)));
}
function ticks(low, high, count) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * ([1, 2, 2.5, 5, 10].find((m) => m * power >= raw * 0.999) || 10), found = [];
  for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + step * 1e-6; t += step) found.push(Number(t.toPrecision(12)));
  return found;
}
function smooth(values, window) {
  return values.map((value, i) => {
    const reach = Math.min(window >> 1, i, values.length - 1 - i);
    const part = values.slice(i - reach, i + reach + 1).filter(isNumber);
    return isNumber(value) && part.length ? part.reduce((a, b) => a + b, 0) / part.length : value;
  });
}

// ---- charts ------------------------------------------------------------------------------------------------------
const drawn = [];  // drawn again when the width changes
const tip = el("div", { id: "tip", role: "status" }), card = el("div", { id: "card" });
function place(node, x, y) {
  node.style.display = "block";
  const wide = document.documentElement.clientWidth;
  node.style.left = `${Math.max(8, Math.min(x + 14, wide - node.offsetWidth - 10)) + scrollX}px`;
  const below = y + 20 + node.offsetHeight < innerHeight;
  node.style.top = `${(below ? y + 20 : Math.max(4, y - node.offsetHeight - 12)) + scrollY}px`;
}
function figure(title, unit, draw, legend) {
  const box = el("div"), head = el("h3", {}, title, " ", el("span", { class: "unit" }, unit ? `(${unit})` : ""));
  const paint = () => { box.replaceChildren(draw(Math.max(280, box.clientWidth))); };
  drawn.push(paint);
  return el("figure", {}, head, el("div", { class: "legend" }, legend), box);
}
function swatch(line, label, value) {
  const mark = svg("svg", { viewBox: "0 0 24 8", class: "swatch", "aria-hidden": "true" });
  mark.append(line.block ? svg("rect", { x: 2, y: 0, width: 12, height: 8, rx: 1, fill: colour(line.colour) })
    : svg("line", { x1: 0, x2: 24, y1: 4, y2: 4, stroke: colour(line.colour), "stroke-width": 2.5,
      "stroke-dasharray": DASHES[line.dash || 0] }));
  return el("span", {}, mark, label, value ? el("span", {}, " ", el("b", {}, value)) : null);
}
// spec: {title, unit, x, share, zero, log, lines: [{name, x, y, colour, dash, faint}]}
function lineChart(spec) {
  const lines = spec.lines.filter((line) => line.y.some(isNumber));
  if (!lines.length) return null;
  const legend = lines.filter((line) => !line.faint).map((line) => {
    const known = line.y.filter(isNumber), first = short(known[0], spec.share), last = short(known.at(-1), spec.share);
    return swatch(line, line.name, spec.ends === false ? "" : known.length > 1 ? `${first} → ${last}` : first);
  });
  return figure(spec.title, spec.unit, (width) => drawLines(spec, lines, width), legend);
}
function scales(spec, lines, width, height) {
  const xs = lines.flatMap((line) => line.x), ys = lines.flatMap((line) => line.y).filter(isNumber);
  const pad = { left: 46, right: 12, top: 8, bottom: 34 };
  let [low, high] = [Math.min(...ys), Math.max(...ys)];
  if (spec.zero !== false && low > 0) low = 0;
  if (low === high) { high += Math.abs(high) * 0.1 || 1; }
  if (spec.share) high = Math.min(Math.max(high, 0.05), 1);
  const yTicks = ticks(low, high, 4), step = yTicks[1] - yTicks[0] || 1;
  if (yTicks.at(-1) < high) yTicks.push(Number((yTicks.at(-1) + step).toPrecision(12)));
  if (yTicks[0] > low) yTicks.unshift(Number((yTicks[0] - step).toPrecision(12)));
  const [bottom, top] = [yTicks[0], yTicks.at(-1)];
  const warp = spec.log ? (x) => Math.log2(x + 1) : (x) => x;
  let [from, to] = [warp(Math.min(...xs)), warp(Math.max(...xs))];
  if (from === to) { from -= 0.5; to += 0.5; }
  const inner = width - pad.left - pad.right, tall = height - pad.top - pad.bottom;
  return { pad, yTicks, width, height, from, to, warp,
    x: (v) => pad.left + inner * (warp(v) - from) / (to - from),
    y: (v) => pad.top + tall * (top - v) / (top - bottom) };
}
function axes(root, spec, s, xTicks) {
  for (const t of s.yTicks) {
    root.append(svg("line", { x1: s.pad.left, x2: s.width - s.pad.right, y1: s.y(t), y2: s.y(t), stroke: "var(--grid)" }));
    root.append(svg("text", { x: s.pad.left - 6, y: s.y(t) + 4, "text-anchor": "end" }, tick(t, spec.share)));
  }
  for (const t of xTicks) root.append(svg("text", { x: s.x(t), y: s.height - 18, "text-anchor": "middle" }, String(t)));
  const label = { x: s.pad.left + (s.width - s.pad.left - s.pad.right) / 2, y: s.height - 3, "text-anchor": "middle" };
  root.append(svg("text", label, spec.x));
}
function canvas(spec, width, height) {
  return svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": spec.title });
}
function drawLines(spec, lines, width) {
  const height = spec.height || 220, root = canvas(spec, width, height), s = scales(spec, lines, width, height);
  const xs = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  const whole = spec.log ? xs.filter((x, i) => i === 0 || Number.isInteger(Math.log2(x)))
    : ticks(s.from, s.to, Math.max(2, Math.floor(width / 90))).filter(Number.isInteger);
  axes(root, spec, s, whole);
  for (const line of lines) {
    let path = "", pen = false;
    line.x.forEach((x, i) => {
      if (isNumber(line.y[i])) path += `${pen ? "L" : "M"}${s.x(x).toFixed(1)} ${s.y(line.y[i]).toFixed(1)}`;
      pen = isNumber(line.y[i]);
    });
    root.append(svg("path", { d: path, fill: "none", stroke: colour(line.colour), "stroke-width": line.faint ? 1 : 2,
      opacity: line.faint ? 0.35 : 1, "stroke-linejoin": "round", "stroke-dasharray": DASHES[line.dash || 0] }));
    if (!line.faint && line.x.length <= 20) line.x.forEach((x, i) => isNumber(line.y[i]) && root.append(
      svg("circle", { cx: s.x(x), cy: s.y(line.y[i]), r: 2.6, fill: colour(line.colour) })));
  }
  hover(root, s, xs, (x) => [`${spec.x} ${spec.names ? spec.names(x) : x}`, ...lines.filter((line) => !line.faint).map((line) => {
    const i = line.x.indexOf(x);
    return i < 0 || !isNumber(line.y[i]) ? null : swatch(line, line.name, short(line.y[i], spec.share));
  })]);
  return root;
}
function hover(root, s, xs, describe) {
  const rule = svg("line", { y1: s.pad.top, y2: s.height - s.pad.bottom, stroke: "var(--muted)", opacity: 0 });
  root.append(rule);
  root.addEventListener("pointermove", (event) => {
    const at = event.clientX - root.getBoundingClientRect().left;
    const near = xs.reduce((a, b) => (Math.abs(s.x(b) - at) < Math.abs(s.x(a) - at) ? b : a));
    for (const end of ["x1", "x2"]) rule.setAttribute(end, s.x(near));
    rule.setAttribute("opacity", 0.6);
    tip.replaceChildren(...describe(near).filter(Boolean).map((part) => el("div", {}, part)));
    place(tip, event.clientX, event.clientY);
  });
  root.addEventListener("pointerleave", () => { rule.setAttribute("opacity", 0); tip.style.display = "none"; });
}
// Seconds of a step by phase, one bar a step or a group of steps; without what is next to nothing.
const OF_PHASE = { student: 0, teacher: 1, rollout: 2, teacher_samples: 3, plan: 4, other: 6 };
function phaseChart(run) {
  const c = run.metrics.columns, steps = c.step || [], sum = (name) => (c[name] || []).reduce((a, b) => a + (b || 0), 0);
  const present = run.phases.filter((p) => sum(`${p}_s`) > 0.001 * sum("step_time_s"));
  if (!present.length) return null;
  const each = Math.ceil(steps.length / 120), bars = [];
  for (let i = 0; i < steps.length; i += each) {
    const end = Math.min(i + each, steps.length);
    const mean = (p) => c[`${p}_s`].slice(i, end).reduce((a, b) => a + (b || 0), 0) / (end - i);
    bars.push({ x: steps[end - 1], first: steps[i], values: present.map(mean) });
  }
  const total = present.map((_, k) => bars.reduce((a, bar) => a + bar.values[k], 0)), all = total.reduce((a, b) => a + b, 0);
  const legend = present.map((p, k) => swatch({ block: true, colour: OF_PHASE[p] }, p.replaceAll("_", " "), short(total[k] / all, true)));
  const spec = { title: "Seconds of a step, by phase", x: "step" };
  return figure(spec.title, "s", (width) => {
    const height = 230, root = canvas(spec, width, height), xs = bars.map((bar) => bar.x);
    const sums = bars.map((bar) => bar.values.reduce((a, b) => a + b, 0));
    const s = scales(spec, [{ x: xs, y: sums }], width, height), pitch = (width - 58) / bars.length;
    s.x = (x) => s.pad.left + pitch * (xs.indexOf(x) + 0.5);
    const every = Math.ceil(bars.length / (width / 80));
    axes(root, spec, s, xs.filter((_, i) => i % every === every - 1 || bars.length <= width / 60));
    bars.forEach((bar, i) => {
      let base = 0;
      bar.values.forEach((value, k) => {
        const top = s.y(base + value), tall = s.y(base) - top;
        if (tall > 0) root.append(svg("rect", { x: s.x(bar.x) - pitch * 0.42, y: top, width: pitch * 0.84, height: tall, fill: colour(OF_PHASE[present[k]]) }));
        base += value;
      });
    });
    hover(root, s, xs, (x) => {
      const bar = bars[xs.indexOf(x)], range = bar.first === x ? `step ${x}` : `steps ${bar.first} to ${x}, mean`;
      return [range, ...present.map((p, k) => swatch({ block: true, colour: OF_PHASE[p] }, p.replaceAll("_", " "), `${short(bar.values[k])} s`))];
    });
    return root;
  }, legend);
}

// ---- panels: which columns are shown together ----------------------------------------------------------------------
const NATS = "nats per token";
const RESULT = [
  { title: "Held-out divergence from the teacher", unit: NATS, of: "evaluations", keys: { forward_kl: "forward KL", reverse_kl: "reverse KL", jsd: "JSD" } },
  { title: "Held-out agreement on the next token", share: true, of: "evaluations", keys: { agreement: "both prefer the same token" } },
  { title: "Training loss", unit: NATS, of: "metrics", smooth: true, keys: { loss: "loss" } },
  { title: "Held-out likelihood of the text", unit: "-log p, " + NATS, of: "evaluations", zero: false, keys: { nll: "student" } },
  { title: "Accuracy of greedy completions", share: true, of: "evaluations", keys: { "generate/accuracy": "accuracy" } },
  { title: "Length of greedy completions", unit: "tokens", of: "evaluations", keys: { "generate/mean_length": "mean length" } },
  { title: "Training loss by source of the completions", unit: NATS, of: "metrics", smooth: true, atLeast: 2,
    keys: { "source/student/loss": "student's", "source/teacher/loss": "teacher's", "source/dataset/loss": "data set's" } },
];
const HEALTH = [
  { title: "Entropy of the next token", unit: "nats", of: "metrics", smooth: true, keys: { "health/student_entropy": "student", "health/teacher_entropy": "teacher" } },
  { title: "The teacher's 8 most probable tokens", share: true, of: "metrics", smooth: true,
    keys: { "health/teacher_top_mass": "teacher's mass", "health/student_top_mass": "student's mass", "health/top_overlap": "among the student's 8" } },
  { title: "Gradient norm, before clipping", of: "metrics", smooth: true, keys: { grad_norm: "gradient norm" } },
  { title: "Learning rate", of: "metrics", keys: { lr: "learning rate" } },
  { title: "Sampled completions", share: true, of: "metrics", keys: { "rollout/truncated": "cut at their limit", "rollout/repeated": "repeated" } },
  { title: "Length of sampled completions", unit: "tokens", of: "metrics", smooth: true, keys: { "rollout/mean_length": "mean length", "schedule/max_completion_length": "limit" } },
  { title: "Sampler against trainer", unit: NATS, of: "metrics", keys: { "health/logprob_difference": "difference of log-probabilities" } },
  { title: "Load of the busiest expert", unit: "of an even share", of: "metrics", smooth: true, keys: { "moe/load_mean": "mean layer", "moe/load_max": "most uneven layer" } },
];
const SPEED = [{ title: "Speed", unit: "completion tokens per s", of: "metrics", smooth: true, keys: { tokens_per_s: "tokens/s" } },
  { title: "Completion tokens of a step", unit: "tokens", of: "metrics", smooth: true, keys: { num_tokens: "tokens" } }];

function panel(p) {
  const made = [];
  const add = (lines, title) => {
    const spec = { title, unit: p.unit, x: "step", share: p.share, zero: p.zero, lines: [] };
    for (const line of lines) {
      const c = line.run[p.of].columns;
      if (!c[line.key]) continue;
      const base = { ...line, x: c.step, y: c[line.key] };
      if (p.smooth && base.y.length >= 18) {
        if (!several) spec.lines.push({ ...base, faint: true });
        spec.lines.push({ ...base, y: smooth(base.y, 2 * Math.floor(Math.min(base.y.length / 18, 20)) + 3) });
      } else spec.lines.push(base);
    }
    if (spec.lines.length) made.push(lineChart(spec));
  };
  const keys = Object.entries(p.keys), present = (run) => keys.filter(([key]) => run[p.of].columns[key]).length;
  if (Math.max(...runs.map(present)) < (p.atLeast || 1)) return [];
  if (!several) add(keys.map(([key, name], i) => ({ run: runs[0], key, name, colour: i, dash: i })), p.title);
  else for (const [key, name] of keys) {
    const title = keys.length > 1 ? `${p.title}: ${name}` : p.title;
    add(runs.map((run, i) => ({ run, key, name: run.name, colour: i, dash: i })), title);
  }
  return made.filter(Boolean);
}
const charts = (panels, wide) => {
  const found = panels.flatMap(panel);
  return found.length ? el("div", { class: wide ? "charts wide" : "charts" }, found) : null;
};

// ---- parts -------------------------------------------------------------------------------------------------------
function duration(s) {
  if (!isNumber(s)) return "–";
  if (s < 90) return `${s.toFixed(0)} s`;
  return s < 5400 ? `${(s / 60).toFixed(0)} min` : `${(s / 3600).toFixed(1)} h`;
}
function head() {
  const parts = runs.map((run, i) => {
    const s = run.summary, name = several ? el("h3", {}, swatch({ colour: i, dash: i }, run.name)) : null;
    const facts = [["teacher", s.teacher_model || "none"], ["student", s.model], ["loss", s.loss], ["layout", s.layout],
      ["training", `${run.state_text} in ${duration(s.training_s)}; ${short(s.num_tokens)} completion tokens, ${short(s.tokens_per_s)} a second`],
      ["held out", (s.eval_dataset || []).join(", ") || "none"], ["exported", s.exported_model || "not yet"]];
    return [name, el("dl", {}, facts.map(([what, text]) => [el("dt", {}, what), el("dd", {}, String(text))]))];
  });
  const states = several ? null : el("span", { class: `state ${runs[0].state}` }, runs[0].state);
  return el("header", {}, el("h1", {}, data.title, states), parts);
}
function tiles() {
  if (several) return null;
  const found = runs[0].table.filter((row) => ["forward_kl", "agreement", "nll", "generate/accuracy"].includes(row.key));
  return el("div", { class: "tiles" }, found.map((row) => el("div", { class: "tile" },
    el("div", { class: "what" }, row.name),
    el("div", { class: "value" }, row.before === null || row.after === null ? null : el("span", { class: "was" }, `${short(row.before, row.share)} → `),
      short(row.after === null ? row.before : row.after, row.share)))));
}
function results() {
  const keys = [...new Set(runs.flatMap((run) => run.table.map((row) => row.key)))];
  if (!keys.length) return el("p", { class: "note" }, "No evaluation: no --eval_dataset, or it has not come to the first one.");
  const has = (name) => runs.some((run) => run.table.some((row) => row[name] !== null));
  const columns = ["before", "after", "exported"].filter(has);
  const heads = runs.flatMap((run) => columns.map((name) => el("th", {}, several ? [run.name, el("br"), name] : name)));
  const rows = keys.map((key) => {
    const of = runs.map((run) => run.table.find((row) => row.key === key)), known = of.find(Boolean);
    const cells = of.flatMap((row) => columns.map((name) => el("td", {}, row ? short(row[name], known.share) : "–")));
    return el("tr", {}, el("td", { class: "text" }, known.name), cells);
  });
  return el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, el("th"), heads)), el("tbody", {}, rows)));
}
function choose(label, names, at, pick) {
  const buttons = names.map((name, i) => el("button", { type: "button", "aria-pressed": String(i === at), onclick: () => {
    buttons.forEach((button, k) => button.setAttribute("aria-pressed", String(k === i)));
    pick(i);
  } }, name));
  return names.length > 1 ? el("span", {}, label, buttons) : null;
}
const MEASURES = { forward_kl: "forward KL", reverse_kl: "reverse KL", jsd: "JSD", nll: "student's -log p", teacher_nll: "teacher's -log p" };
function positions() {
  const views = runs.flatMap((run, r) => (several ? run.positions.slice(-1) : run.positions).map((row, i) =>
    ({ name: several ? run.name : `step ${row.step}`, table: row.by_position, colour: several ? r : i, dash: several ? r : i })));
  if (!views.length) return null;
  const names = Object.keys(MEASURES).concat("agreement").filter((key) => views.some((view) => view.table[key]));
  const holder = el("div", { class: "charts wide" });
  const show = (key) => {
    const lines = views.filter((view) => view.table[key]).map((view) => ({ ...view, x: view.table.first, y: view.table[key] }));
    const ends = new Map(views.flatMap((view) => view.table.first.map((first, i) => [first, view.table.end[i]])));
    const share = key === "agreement", chart = lineChart({ title: `Held-out ${share ? "agreement" : MEASURES[key]} by place in the completion`,
      unit: share ? "" : NATS, x: "token of the completion", share, log: true, ends: false, height: 250, lines,
      names: (x) => (ends.get(x) - x > 1 ? `${x} to ${ends.get(x) - 1}` : `${x}`) });
    holder.replaceChildren(...[chart].filter(Boolean));
    if (chart) drawn.at(-1)();
  };
  setTimeout(() => show(names[0]));
  const labels = names.map((key) => MEASURES[key] || "agreement");
  return [el("div", { class: "controls" }, choose("show ", labels, 0, (i) => show(names[i]))), holder,
    el("p", { class: "note" }, "0 is the first token of a completion. A divergence that grows with the place means that the student drifts away from what the teacher would say.")];
}
function health() {
  const tables = runs.map((run) => el("div", {}, several ? el("h3", {}, run.name) : null, el("table", {}, el("tbody", {},
    run.checks.map((check) => el("tr", {}, el("td", { class: check.status }, { ok: "✓", warn: "!", "": "" }[check.status]),
      el("td", { class: "text" }, check.name), el("td", { class: "text" }, check.text)))))));
  return tables.concat(charts(HEALTH)).concat(runs.map(happened));
}
function happened(run) {
  if (!run.events.length && !run.bad_steps.length) return null;
  const rows = run.events.map((event) => [event.time, event.step, event.kind, event.text]).concat(
    run.bad_steps.map((bad) => ["", bad.step, "no update", `${bad.problem}; samples in bad_steps/${bad.file}`]));
  const most = 200, shown = rows.slice(-most);
  const table = el("table", {}, el("thead", {}, el("tr", {}, ["when", "step", "what", ""].map((name, i) => el("th", { class: i === 1 ? "" : "text" }, name)))),
    el("tbody", {}, shown.map((row) => el("tr", {}, row.map((cell, i) => el("td", { class: i === 1 ? "" : "text" }, String(cell)))))));
  const cut = rows.length > most ? el("p", { class: "note" }, `The last ${most} of ${rows.length}.`) : null;
  return el("details", { open: shown.length <= 12 ? "" : null },
    el("summary", {}, `Starts, resumes, warnings, faults${several ? ` of ${run.name}` : ""} (${rows.length})`), cut, el("div", { class: "scroll" }, table));
}
function time() {
  const stacks = runs.map((run) => {
    const chart = phaseChart(run);
    return chart && several ? el("div", {}, el("h3", {}, run.name), chart) : chart;
  }).filter(Boolean);
  return [el("div", { class: several ? "charts" : "charts wide" }, stacks), charts(SPEED), runs.map(memory)];
}
function memory(run) {
  const { seen, kind, planned } = run.memory;
  if (!seen.length && !planned.length) return null;
  const gb = (bytes) => (isNumber(bytes) ? `${(bytes / 1e9).toFixed(3)}` : "–"), most = Math.max(seen.length, planned.length);
  const rows = [];
  for (let rank = 0; rank < most; rank++) {
    const plan = planned.find((p) => p.rank === rank);
    const peak = plan && plan.peak_bytes ? Math.max(...plan.peak_bytes.map((p) => Object.values(p).reduce((a, b) => a + b, 0))) : null;
    rows.push(el("tr", {}, el("td", { class: "text" }, `rank ${rank}`), el("td", {}, gb(seen[rank])),
      planned.length ? [el("td", {}, gb(peak)), el("td", {}, gb(plan && plan.needed_bytes))] : null));
  }
  const what = kind === "cuda" ? "allocated on the GPU" : "of the process, the program itself included";
  return el("div", { class: "scroll" }, el("h3", {}, `Peak memory${several ? ` of ${run.name}` : ""} `, el("span", { class: "unit" }, "(GB, 10^9 bytes)")),
    el("table", {}, el("thead", {}, el("tr", {}, el("th"), el("th", {}, `seen, ${what}`),
      planned.length ? [el("th", {}, "planned: tensors"), el("th", {}, "planned: with what is reserved")] : null)), el("tbody", {}, rows)));
}

// ---- completions, token by token ---------------------------------------------------------------------------------------
const clean = (text) => text.replace(/[\u0000-\u0008\u000b-\u001f\u007f\u200b-\u200f\u202a-\u202e\u2066-\u2069]/g, "\ufffd");
function completions() {
  const views = runs.flatMap((run) => run.tables.map((row) => ({ ...row,
    name: `${several ? `${run.name}, ` : ""}step ${row.step}${row.of === "step" ? ", its own" : ""}` })));
  if (!views.length) return null;
  const keys = Object.keys(MEASURES).filter((key) => views.some((view) => view.samples.some((sample) => sample[key])));
  let view = views.findLastIndex((v) => v.of === "evaluation"), key = keys[0];
  if (view < 0) view = views.length - 1;
  const holder = el("div");
  const show = () => holder.replaceChildren(...views[view].samples.map((sample) => drawSample(sample, views[view].texts, key)));
  show();
  const scale = el("span", {}, "0 ", el("i", { class: "ramp" }), " 3 nats and more");
  const own = views.some((v) => v.of === "step") ? " “Its own” are completions that the student sampled for that step, the others the data's." : "";
  return [el("p", { class: "note" }, `Point at a token for what both models would have said there.${own}`),
    el("div", { class: "controls" }, choose("after ", views.map((v) => v.name), view, (i) => { view = i; show(); }),
      choose("colour ", keys.map((k) => MEASURES[k]), 0, (i) => { key = keys[i]; show(); }), scale), holder];
}
function drawSample(sample, texts, key) {
  const known = (sample[key] || []).filter(isNumber), mean = known.reduce((a, b) => a + b, 0) / (known.length || 1);
  const cut = sample.ids.length < sample.num_tokens ? `, the first ${sample.ids.length} of ${sample.num_tokens} tokens` : `, ${sample.num_tokens} tokens`;
  const box = el("div", { class: "tokens" });
  sample.ids.forEach((id, i) => {
    const value = sample[key] ? sample[key][i] : null, strength = isNumber(value) ? Math.min(Math.max(value, 0) / 3, 1) * 0.85 : 0;
    const span = el("span", { style: `background: rgba(var(--heat), ${strength.toFixed(3)})` }, clean(textOf(texts, id)));
    span.addEventListener("pointerenter", (event) => { describe(sample, texts, i); place(card, event.clientX, event.clientY); });
    span.addEventListener("pointerleave", () => { card.style.display = "none"; });
    box.append(span);
  });
  return el("div", { class: "sample" }, el("h3", {}, sample.place || `row ${sample.row}`,
    el("span", { class: "unit" }, `${cut}; mean ${MEASURES[key]} ${short(mean)}`)),
    el("pre", {}, clean(sample.prompt || "")), box);
}
const textOf = (texts, id) => (texts[id] === undefined ? `<${id}>` : texts[id]);
const visible = (text) => clean(text).replaceAll("\n", "↵").replaceAll(" ", "·") || "(no text)";
function describe(sample, texts, i) {
  const value = (name) => (sample[name] && isNumber(sample[name][i]) ? `${MEASURES[name]} ${short(sample[name][i])}` : null);
  const side = (name) => (!sample[`${name}_ids`] ? null : el("div", {}, el("b", {}, name), sample[`${name}_ids`][i].map((id, k) => {
    if (id < 0) return null;
    const p = Math.exp(sample[`${name}_logprobs`][i][k]);
    return el("div", { class: `top ${name}${id === sample.ids[i] ? " chosen" : ""}` }, el("i", { style: `width: ${(100 * p).toFixed(1)}%` }),
      el("code", {}, visible(textOf(texts, id))), el("span", {}, `${(100 * p).toFixed(1)} %`));
  })));
  card.replaceChildren(el("div", {}, el("code", {}, visible(textOf(texts, sample.ids[i]))), el("span", { class: "unit" }, `  token ${i}, id ${sample.ids[i]}`)),
    el("div", { class: "unit" }, Object.keys(MEASURES).map(value).filter(Boolean).join(" · ") + " (nats)"),
    el("div", { class: "tops" }, side("student"), side("teacher")));
}
function answers() {
  return runs.flatMap((run) => (run.summary.answers || []).map((answer) => el("div", { class: "sample" },
    el("h3", {}, `Greedy answers${several ? ` of ${run.name}` : ""}, at most ${run.summary.max_new_tokens} tokens`), el("pre", {}, clean(answer.prompt)),
    el("dl", {}, ["reference", "teacher", "student before", "student after"].filter((who) => who in answer).map((who) =>
      [el("dt", {}, who), el("dd", { style: "white-space: pre-wrap" }, clean(answer[who]))])))));
}
function settings() {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.config)))].sort(), text = (value) => (value === undefined ? "default" : JSON.stringify(value));
  const rows = names.map((name) => ({ name, values: runs.map((run) => text(run.config[name])) }));
  const shown = several ? rows.filter((row) => new Set(row.values).size > 1) : rows;
  const table = el("table", {}, el("thead", {}, el("tr", {}, el("th"), runs.map((run) => el("th", { class: "text" }, several ? run.name : "")))),
    el("tbody", {}, shown.map((row) => el("tr", {}, el("td", { class: "text" }, el("code", {}, `--${row.name}`)),
      row.values.map((value) => el("td", { class: "text" }, el("code", {}, value)))))));
  return [el("p", { class: "note" }, several ? "What the runs were given differently." : "Flags that are not at their defaults."), el("div", { class: "scroll" }, table)];
}

// ---- the page ----------------------------------------------------------------------------------------------------
const SECTIONS = [
  ["result", "Result", () => [tiles(), charts(RESULT), results()]],
  ["place", "By place in the completion", positions],
  ["health", "Health", health],
  ["time", "Time and memory", time],
  ["completions", "Completions", () => { const tokens = completions(), greedy = answers(); return tokens || greedy.length ? [tokens, greedy] : null; }],
  ["settings", "Settings", settings],
];
const main = el("main"), links = [];
for (const [id, title, make] of SECTIONS) {
  const found = make();
  if (!found) continue;
  links.push(el("a", { href: `#${id}` }, title));
  main.append(el("h2", { id }, title), ...[found].flat(3).filter(Boolean));
}
document.getElementById("page").append(head(), el("nav", {}, el("div", {}, links)), main,
  el("footer", {}, `Made ${data.made} by megatron-gkd report${data.refresh_s ? `; looks again every ${data.refresh_s} s` : ""}.`), tip, card);
let before = 0;
function redraw() {
  if (innerWidth === before) return;
  before = innerWidth;
  for (const paint of drawn) paint();
}
addEventListener("resize", redraw);
redraw();
if (data.refresh_s) setTimeout(() => location.reload(), 1000 * data.refresh_s);
