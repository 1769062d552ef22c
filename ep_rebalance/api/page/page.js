"use strict";
// Asks for `overview` while somebody looks, and draws it. All text goes in by textContent.

const ASK_EVERY = 2000;
const ASK_AGAIN = 8000; // after an error
const POINTS = 300;

const element = (id) => document.getElementById(id);
const state = { key: "", view: null, course: [], cell: null, timer: 0, asking: false };

// What is shown, as text.

const ratio = (value) => (value == null ? "no traffic yet" : value.toFixed(3));
const percent = (part) => `${(100 * part).toFixed(1)} %`;
const sum = (numbers) => Object.values(numbers).reduce((a, b) => a + b, 0);
const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < units.length - 1) {
    bytes /= 1024;
    unit += 1;
  }
  return `${bytes.toFixed(unit && bytes < 100 ? 1 : 0)} ${units[unit]}`;
}

function duration(seconds) {
  if (seconds < 1) return `${(1000 * seconds).toFixed(seconds < 0.01 ? 1 : 0)} ms`;
  if (seconds < 120) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return `${Math.round(seconds / 3600)} h`;
}

function activity(status, before) {
  if (before && before.steps === status.steps) return [status.paused ? "idle, paused" : "idle", "good"];
  if (status.stuck) return ["stuck", "bad"];
  if (status.activity === "migrating") return ["moving experts", "good"];
  if (status.paused) return ["paused", "bad"];
  if (status.activity === "planning") return ["planning", "good"];
  if (status.activity === "scheduling") return ["preparing a migration", "good"];
  if (status.info.mode !== "rebalance") return [`mode ${status.info.mode}`, "good"];
  return [status.snapshots ? "watching" : "waiting for traffic", "good"];
}

// Tiles, tables and sentences.

function show(id, text) {
  const target = element(id);
  if (target.textContent !== text) target.textContent = text;
}

function showState(text, kind) {
  show("state", text);
  element("state").className = `state ${kind}`;
}

function showNow(status, before) {
  const { overall_imbalance: overall, busiest_rank_tokens: busiest } = status;
  show("served", ratio(overall.served));
  show("contiguous", ratio(overall.contiguous));
  const saved = busiest.contiguous ? 1 - busiest.served / busiest.contiguous : 0;
  show("saved", busiest.contiguous ? percent(saved) : "no traffic yet");
  show("saved-since", `of its tokens, since the start ${ago(status.started, status)}`);
  const measured = [...status.commits].reverse().find((commit) => commit.achieved_gain !== null);
  show("achieved", measured ? percent(measured.achieved_gain) : "not measured yet");
  show("predicted", measured ? `of the step time, by tokens; ${percent(measured.predicted_gain)} were promised` : "of the step time, by tokens");
  const { low, high } = status.measured_gain;
  show("measured", low === undefined ? "" : `${percent(low)} to ${percent(high)} by step times`);
  const { low: least, estimate: waiting, high: most } = status.expert_time;
  const known = least === most ? "set" : status.expert_time_learned ? `${percent(least)} to ${percent(most)}, learned` : "assumed";
  show("waiting", waiting === undefined ? "" : `${percent(waiting)} of a step waits for experts (${known})`);
  show("generation", String(status.generation));
  show("age", status.last_commit_timestamp ? `served since ${ago(status.last_commit_timestamp, status)}` : "as the engine loaded it");
  show("experts", sum(status.migrated_experts).toLocaleString("en"));
  const links = Object.entries(status.migrated_bytes).filter(([, bytes]) => bytes);
  show("bytes", links.map(([link, bytes]) => `${size(bytes)} ${link}`).join(", ") || "no byte");
  const waits = [...status.round_stall_seconds.values, ...status.commit_stall_seconds.values];
  show("stall", waits.length ? duration(Math.max(...waits)) : "none yet");
  show("step", status.step_seconds ? `a step takes ${duration(status.step_seconds)}` : "");
  const [text, kind] = activity(status, before);
  showState(text, kind);
  const moving = status.activity === "migrating";
  show("doing", moving ? `${status.moves_done} of ${plural(status.moves_planned, "expert")} arrived` : "");
  element("progress").hidden = !moving;
  element("progress").value = status.moves_planned ? status.moves_done / status.moves_planned : 0;
}

const ago = (time, status) => `${duration(Math.max(0, status.reported_timestamp - time))} ago`;

function fill(id, rows, columns, nothing) {
  const body = document.createDocumentFragment();
  for (const row of rows) {
    const line = document.createElement("tr");
    row.forEach((value, column) => {
      const cell = line.insertCell();
      cell.textContent = value;
      if (columns.text.includes(column)) cell.className = "text";
    });
    body.append(line);
  }
  if (!rows.length) {
    const cell = document.createElement("tr").insertCell();
    cell.colSpan = columns.count;
    cell.className = "none";
    cell.textContent = nothing;
    body.append(cell.parentNode);
  }
  element(id).replaceChildren(body);
}

function showTables({ status, hottest }) {
  const hot = hottest.map((e) => [e.layer, e.expert, e.load.toFixed(2), e.ranks.length, e.ranks.join(", ")]);
  fill("hottest", hot, { count: 5, text: [4] }, "no traffic yet");
  const commits = [...status.commits].reverse().map((c) => [
    c.generation,
    new Date(1000 * c.time).toLocaleTimeString(),
    c.experts,
    size(c.bytes),
    duration(c.seconds),
    c.imbalance_before.toFixed(3),
    percent(c.predicted_gain),
    c.achieved_gain === null ? "not yet" : percent(c.achieved_gain),
    c.measured_gain === null ? "unknown" : `${percent(c.measured_gain)} ± ${percent(2 * c.measured_gain_error)}`,
    c.fault,
  ]);
  fill("commits", commits, { count: 10, text: [1, 9] }, "the experts are where the engine loaded them");
  const plans = Object.entries(status.plans).filter(([, count]) => count);
  show("plans", plans.length ? `Plans: ${plans.map(([name, n]) => `${n} ${name.replace("_", " ")}`).join(", ")}.` : "No plan yet.");
  const faults = Object.entries(status.file_faults).filter(([, why]) => why);
  const unwritten = faults.map(([file, why]) => `the ${file} cannot be written: ${why}`);
  show("word", [...unwritten, status.message || status.last_decision].join("; "));
  const { info } = status;
  show("settings", `ep_rebalance ${info.version}, mode ${info.mode}, policy ${info.policy}; ${plural(status.layers, "MoE layer")}, ` +
    `${status.experts} experts in ${status.slots} slots on ${plural(status.ep_size, "rank")}.`);
}

// The command for a report about the trace, if one is recorded. Each pipeline stage has a folder of its own.
function showTrace({ config, pp_size: stages }) {
  const folder = config.trace && config.trace.path;
  element("trace").hidden = !folder;
  if (!folder) return;
  const path = stages > 1 ? folder.replace(/stage-0$/, "stage-NUMBER") : folder;
  show("replay", `ep-rebalance replay ${quoted(path)} --report report.html`);
}

// A text as a POSIX shell takes it for one word.
const quoted = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'"'"'`)}'`);

// The drafter has layers, tokens and plans of its own, of which none is in what else the page shows.
function showDrafter(drafter, uncounted) {
  element("drafter").hidden = !drafter && !uncounted;
  element("drafter-box").hidden = !drafter;
  if (uncounted) show("drafter-words", `Its experts stay where they were loaded and are not counted: ${uncounted}`);
  if (!drafter) return;
  const { status } = drafter;
  const { served, contiguous } = status.overall_imbalance;
  const tokens = `${sum(status.phase_tokens).toLocaleString("en")} tokens passed each of its layers, on average`;
  const pinned = status.info.mode === "observe";
  const moves = pinned ? "Its experts stay where they were loaded."
    : `${plural(sum(status.migrated_experts), "expert")} moved, generation ${status.generation}. ${status.message || status.last_decision}`;
  show("drafter-words", `Imbalance ${ratio(served)}, without rebalancing ${ratio(contiguous)}; ${tokens}. ${moves}`);
  const layers = status.moe_layers.map((number, row) => [
    number, ratio(status.imbalance[row]), ratio(status.contiguous_imbalance[row]),
  ]);
  fill("drafter-layers", layers, { count: 3, text: [] }, "no layers");
}

// The course of the imbalance.

function remember(status) {
  const { served, contiguous } = status.overall_imbalance;
  if (served === undefined) return;
  const before = state.course.at(-1);
  const commit = Boolean(before) && before.generation !== status.generation;
  state.course.push({ served, contiguous, generation: status.generation, commit });
  if (state.course.length > POINTS) state.course.shift();
}

function svg(name, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

function drawCourse() {
  const { course } = state;
  if (!course.length) return;
  const top = Math.max(1.05, ...course.flatMap((point) => [point.served, point.contiguous]));
  const y = (value) => 96 - (90 * (value - 1)) / (top - 1);
  const nodes = course.flatMap((point, x) => (point.commit ? [svg("line", { x1: x, x2: x, y1: 0, y2: 100, class: "commit" })] : []));
  for (const line of ["contiguous", "served"]) {
    const points = course.map((point, x) => `${x},${y(point[line]).toFixed(2)}`).join(" ");
    nodes.push(svg("polyline", { points, class: line }));
  }
  element("course").setAttribute("viewBox", `0 0 ${Math.max(30, course.length - 1)} 100`);
  element("course").replaceChildren(...nodes);
  show("course-words", `From 1 (even) at the bottom to ${top.toFixed(2)} at the top. Now ${course.at(-1).served.toFixed(3)}, ` +
    `without rebalancing ${course.at(-1).contiguous.toFixed(3)}.`);
}

// The map of layers and ranks.

function shade(colours, value) {
  const place = Math.round(8 * Math.min(1, Math.max(0, value - 0.5)));
  return colours[place];
}

// Rows are in the order of the layers; each has a number in the model.
function numberOf(row) {
  return state.view.status.moe_layers[row];
}

// On many ranks a column is that of the busiest of some neighbours.
function ranksOf(column) {
  const per = state.view.ranks_per_column;
  const first = column * per;
  const last = Math.min(first + per, state.view.status.ep_size) - 1;
  return last > first ? `ranks ${first} to ${last}, the busiest` : `rank ${first}`;
}

function geometry() {
  const load = state.view.rank_load;
  const layers = load.length;
  const ranks = layers ? load[0].length : 0;
  const wide = element("map-box").clientWidth;
  const left = 30;
  const top = 20;
  const width = Math.max(7, Math.min(96, Math.floor((wide - left) / Math.max(1, ranks))));
  const height = Math.max(8, Math.min(26, Math.floor(620 / Math.max(1, layers))));
  return { load, layers, ranks, left, top, width, height };
}

function drawMap() {
  const { load, layers, ranks, left, top, width, height } = geometry();
  const canvas = element("map");
  const scale = window.devicePixelRatio || 1;
  const [wide, high] = [left + ranks * width, top + layers * height];
  canvas.width = wide * scale;
  canvas.height = high * scale;
  canvas.style.width = `${wide}px`;
  canvas.style.height = `${high}px`;
  show("map-words", words(load));
  if (!layers) return;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const colours = [...document.querySelectorAll(".scale i")].map((i) => getComputedStyle(i).backgroundColor);
  const ink = getComputedStyle(document.body).color;
  pen.font = "11px system-ui, sans-serif";
  pen.textBaseline = "middle";
  load.forEach((row, layer) => row.forEach((value, rank) => {
    const [x, y] = [left + rank * width, top + layer * height];
    pen.fillStyle = shade(colours, value);
    pen.fillRect(x, y, width - 1, height - 1);
    if (width >= 36 && height >= 14) {
      pen.fillStyle = contrast(pen.fillStyle);
      pen.textAlign = "center";
      pen.fillText(value.toFixed(2), x + width / 2, y + height / 2);
    }
  }));
  pen.fillStyle = ink;
  pen.textAlign = "center";
  const everyRank = Math.ceil(22 / width);
  for (let rank = 0; rank < ranks; rank += everyRank) pen.fillText(rank * state.view.ranks_per_column, left + (rank + 0.5) * width, top / 2);
  pen.textAlign = "right";
  const everyLayer = Math.ceil(13 / height);
  for (let layer = 0; layer < layers; layer += everyLayer) pen.fillText(numberOf(layer), left - 5, top + (layer + 0.5) * height);
  if (state.cell) {
    pen.strokeStyle = ink;
    pen.lineWidth = 2;
    pen.strokeRect(left + state.cell.rank * width, top + state.cell.layer * height, width - 1, height - 1);
  }
}

function contrast(colour) {
  const channels = colour.match(/[0-9a-f]{2}/gi).map((part) => parseInt(part, 16));
  return 0.299 * channels[0] + 0.587 * channels[1] + 0.114 * channels[2] > 140 ? "#111" : "#fff";
}

function words(load) {
  if (!load.length) return "No traffic yet.";
  let worst = { value: 0 };
  load.forEach((row, layer) => row.forEach((value, rank) => {
    if (value > worst.value) worst = { value, layer, rank };
  }));
  const per = state.view.ranks_per_column;
  const columns = per > 1 ? `the busiest of ${per} ranks each` : "ranks";
  return `Rows are layers, columns are ${columns}; recent tokens over the layer's mean. ` +
    `Highest: layer ${numberOf(worst.layer)}, ${ranksOf(worst.rank)}, ${worst.value.toFixed(2)} times the mean.`;
}

function choose(layer, rank) {
  const { load, layers, ranks } = geometry();
  if (!layers) return;
  state.cell = { layer: Math.min(layers - 1, Math.max(0, layer)), rank: Math.min(ranks - 1, Math.max(0, rank)) };
  const value = load[state.cell.layer][state.cell.rank];
  show("cell", `Layer ${numberOf(state.cell.layer)}, ${ranksOf(state.cell.rank)}: ${value.toFixed(2)} times the mean of the layer.`);
  drawMap();
}

function pointed(event) {
  if (!state.view) return;
  const { left, top, width, height, layers, ranks } = geometry();
  const [layer, rank] = [Math.floor((event.offsetY - top) / height), Math.floor((event.offsetX - left) / width)];
  if (layer >= 0 && layer < layers && rank >= 0 && rank < ranks) choose(layer, rank);
}

function pressed(event) {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!step || !state.view) return;
  event.preventDefault();
  const { layer, rank } = state.cell || { layer: -step[0], rank: -step[1] };
  choose(layer + step[0], rank + step[1]);
}

// Asking.

function draw() {
  if (!state.view) return;
  drawCourse();
  drawMap();
}

function accept(view) {
  const before = state.view && state.view.status;
  state.view = view;
  element("main").hidden = false;
  element("key").hidden = element("trouble").hidden = true;
  show("model", view.status.model.split("/").slice(-2).join("/"));
  document.title = `${activity(view.status, before)[0]} - ep_rebalance`;
  showNow(view.status, before);
  showTables(view);
  showTrace(view.status);
  showDrafter(view.drafter, view.status.uncounted_drafter);
  remember(view.status);
  draw();
  if (state.cell) choose(state.cell.layer, state.cell.rank);
}

function complain(text) {
  showState("no answer", "bad");
  element("trouble").hidden = false;
  show("trouble", text);
}

async function ask() {
  if (state.asking || document.hidden) return;
  state.asking = true;
  let pause = ASK_EVERY;
  try {
    const headers = state.key ? { authorization: `Bearer ${state.key}` } : {};
    const answer = await fetch("overview", { headers, cache: "no-store" });
    if (answer.status === 401) {
      showState("needs a key", "bad");
      show("wrong", state.key ? "That was not the key." : "");
      element("key").hidden = false;
      pause = 0;
    } else if (!answer.ok) {
      throw new Error((await answer.json()).error);
    } else {
      accept(await answer.json());
    }
  } catch (error) {
    pause = ASK_AGAIN;
    complain(`No answer from the server (${error.message}). What is shown is from before; asking again.`);
  }
  state.asking = false;
  clearTimeout(state.timer);
  if (pause) state.timer = setTimeout(ask, pause);
}

element("key").addEventListener("submit", (event) => {
  event.preventDefault();
  state.key = element("secret").value;
  ask();
});
element("map").addEventListener("pointermove", pointed);
element("map").addEventListener("click", pointed);
element("map").addEventListener("keydown", pressed);
document.addEventListener("visibilitychange", ask);
window.addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
ask();
