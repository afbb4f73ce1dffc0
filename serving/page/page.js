// The page that python -m serving.page writes: choose a history and a size, and see the recommendations.
// N items are numbered from 1. A model answers as serving/graphs.py describes.

const TOP = 10;
const PAGE = 60; // items of the catalogue shown at once
const MEASURE_MS = 20; // spent on repeating an answer to time it

const $ = (id) => document.getElementById(id);
const sessions = new Map(); // size -> promise of its session
let ort, catalogue, numbers, history = [], shown = PAGE, asked = 0, queue = Promise.resolve();

class PageError extends Error {}

function say(text) {
  $("message").textContent = text;
  $("message").hidden = !text;
}

// ---------------------------------------------------------------------------------------------------------- the files

async function read(path) {
  const hint = "Build the page again with python -m serving.page.";
  const answer = await fetch(path).catch(() => null);
  if (!answer) throw new PageError(`${path} could not be loaded. Is the server still running?`);
  if (!answer.ok) throw new PageError(`${path} is missing (status ${answer.status}). ${hint}`);
  return answer;
}

const damaged = (path, problem) => new PageError(`${path} is damaged: ${problem}. Copy or build the page again.`);

function crc32(bytes) {
  let crc = ~0;
  for (const byte of bytes) crc = (crc >>> 8) ^ CRC_TABLE[(crc ^ byte) & 255];
  return ~crc >>> 0;
}

const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  for (let bit = 0; bit < 8; bit++) byte = byte & 1 ? (byte >>> 1) ^ 0xedb88320 : byte >>> 1;
  return byte;
});

function session(size) {
  if (!sessions.has(size)) {
    sessions.set(size, open(catalogue.models.find((model) => model.size === size)));
    sessions.get(size).catch(() => sessions.delete(size)); // a later try may succeed
  }
  return sessions.get(size);
}

async function open({ file, bytes, crc }) {
  const content = new Uint8Array(await (await read(file)).arrayBuffer());
  if (content.length !== bytes || crc32(content) !== crc) {
    throw damaged(file, "its checksum differs");
  }
  return ort.InferenceSession.create(content, { executionProviders: ["wasm"], logSeverityLevel: 3 });
}

// -------------------------------------------------------------------------------------------------------- the answers

function run(model, items) {
  const padded = items.length ? items : [0];
  return model.run({
    history: new ort.Tensor("int64", BigInt64Array.from(padded, BigInt), [1, padded.length]),
    exclude_history: new ort.Tensor("bool", [true], [1]),
  });
}

// Return the best items, and the median milliseconds of an answer if `timed`. A session runs one request at a time.
export function recommend(size, items, timed = false) {
  const answer = queue.then(async () => {
    const model = await session(size);
    const best = Array.from((await run(model, items)).items.data, Number).filter(Boolean);
    if (!timed) return { best };
    const times = [];
    const end = performance.now() + MEASURE_MS;
    do {
      const start = performance.now();
      await run(model, items);
      times.push(performance.now() - start);
    } while (times.length < 5 || performance.now() < end);
    return { best, milliseconds: times.sort((a, b) => a - b)[times.length >> 1] };
  });
  queue = answer.catch(() => {});
  return answer;
}

// Return the items with the most similar vectors.
export async function similar(size, item) {
  const { file, similar: count } = catalogue.models.find((model) => model.size === size);
  const path = file.replace(".onnx", ".similar"), content = await (await read(path)).arrayBuffer();
  const bytes = 4 * count * catalogue.ids.length;
  if (content.byteLength !== bytes) throw damaged(path, `it has ${content.byteLength} bytes instead of ${bytes}`);
  return Array.from(new Uint32Array(content).subarray((item - 1) * count, item * count));
}

// ----------------------------------------------------------------------------------------------------------- the view

const title = (item) => catalogue.titles[item - 1] || catalogue.ids[item - 1];

function element(name, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(name), attributes);
  made.append(...children);
  return made;
}

function itemButton(item, label, onclick) {
  const button = element("button", { className: "item", onclick }, element("span", {}, title(item)));
  if (catalogue.pictures) {
    const path = catalogue.pictures[item - 1];
    const picture = path ? [element("img", { src: path, alt: "", loading: "lazy" })] : [];
    button.prepend(element("span", { className: "picture" }, ...picture));
  }
  button.setAttribute("aria-label", `${label}: ${title(item)}`);
  button.dataset.item = item;
  return button;
}

// Replace the children of a list; the focus stays at its place.
function rebuild(list, children) {
  const at = [...list.querySelectorAll("button")].indexOf(document.activeElement);
  list.replaceChildren(...children);
  const buttons = list.querySelectorAll("button");
  if (at >= 0) (buttons[Math.min(at, buttons.length - 1)] || $("example")).focus();
}

const listed = (...children) => element("li", {}, ...children);
const chosen = () => catalogue.models[$("slider").value];
const largest = () => catalogue.models.at(-1);

function setHistory(items) {
  history = items;
  const params = new URLSearchParams({ size: chosen().size, history: items.map((i) => catalogue.ids[i - 1]).join(",") });
  globalThis.history.replaceState(null, "", `#${params}`);
  const shown = items.map((item, at) =>
    listed(itemButton(item, "Remove", () => setHistory(items.filter((_, i) => i !== at)))));
  rebuild($("history"), shown.length ? shown : [listed("Empty: these are the recommendations for a new visitor.")]);
  $("history").scrollLeft = $("history").scrollWidth;
  return answer();
}

const add = (item) => setHistory([...history, item].slice(-catalogue.max_len));

function showSize() {
  const { size, bytes, ndcg } = chosen(), last = catalogue.models.length - 1;
  $("size").textContent = size;
  $("slider").setAttribute("aria-valuetext", `${size} dimensions`);
  $("slider").style.setProperty("--filled", `${last ? (100 * $("slider").value) / last : 100}%`);
  $("bytes").textContent = bytes < 1e6 ? `${Math.round(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
  $("quality-box").hidden = ndcg === null;
  if (ndcg !== null) {
    const share = largest().ndcg ? ` ${Math.round((100 * ndcg) / largest().ndcg)}% of ${largest().size}'s` : "";
    $("quality").replaceChildren(ndcg.toFixed(4), element("small", {}, share));
  }
  for (const mark of document.querySelectorAll("[data-size]")) {
    mark.classList.toggle("chosen", Number(mark.dataset.size) === size);
    mark.classList.toggle("inside", Number(mark.dataset.size) < size);
  }
  showPlane();
}

async function answer() {
  const mine = ++asked, { size } = chosen();
  showSize();
  try {
    const { best, milliseconds } = await recommend(size, history, true);
    if (mine !== asked) return; // the slider has moved on
    say(unknownIds());
    $("milliseconds").textContent = `${milliseconds.toFixed(milliseconds < 9.95 ? 1 : 0)} ms`;
    const full = size === largest().size ? { best } : await recommend(largest().size, history);
    if (mine === asked) showBest(best, full.best);
  } catch (error) {
    if (mine === asked) fail(error);
  }
}

function showBest(best, full) {
  const same = best.filter((item) => full.includes(item)).length, all = largest().size;
  $("same").textContent = `${same} of ${best.length}`;
  $("same-label").textContent = `Same as ${all}`;
  const others = best.length - same;
  const change = chosen().size === all ? "This is the full model."
    : !others ? `All ${same} are among the full model's ten.`
    : `${others} with a dot ${others > 1 ? "are" : "is"} not among the full model's ten.`;
  $("changes").textContent = `${change} Choose an item to see similar ones.`;
  rebuild($("best"), best.map((item, at) => {
    const row = element("div", { className: "row" }, element("span", { className: "rank" }, at + 1));
    const made = listed(row);
    const plus = element("button", { className: "add", onclick: () => add(item) }, "+");
    plus.setAttribute("aria-label", `Add to history: ${title(item)}`);
    const label = full.includes(item) ? "Similar to" : `Not among the ten of ${all}. Similar to`;
    const button = itemButton(item, label, () => toggleSimilar(made, item, button));
    button.setAttribute("aria-expanded", "false");
    row.append(button, plus);
    made.classList.toggle("only", !full.includes(item));
    return made;
  }));
}

async function toggleSimilar(row, item, button) {
  const isOpen = () => button.getAttribute("aria-expanded") === "true";
  button.setAttribute("aria-expanded", String(!isOpen()));
  row.querySelector(".similar")?.remove();
  if (!isOpen()) return;
  try {
    const others = await similar(chosen().size, item);
    if (!isOpen() || row.querySelector(".similar")) return; // clicked again meanwhile
    const list = element("ul", {}, ...others.map((other) => listed(itemButton(other, "Add to history", () => add(other)))));
    row.append(element("div", { className: "similar" }, element("p", { className: "hint" }, "Similar items"), list));
  } catch (error) {
    button.setAttribute("aria-expanded", "false"); // so that the next click tries again
    fail(error);
  }
}

function showCatalogue() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = [];
  for (let item = 1; item <= catalogue.ids.length; item++) {
    const text = `${title(item)} ${catalogue.ids[item - 1]}`.toLowerCase();
    if (words.every((word) => text.includes(word))) found.push(item);
  }
  $("catalogue").replaceChildren(...found.slice(0, shown).map((item) => listed(itemButton(item, "Add to history", () => add(item)))));
  $("more").hidden = found.length <= shown;
  $("found").textContent = words.length ? `${found.length.toLocaleString("en")} found`
    : `${found.length.toLocaleString("en")} items. Choose one to add it to your history.`;
}

function showScale() {
  const { models } = catalogue, all = largest().size;
  $("slider").max = models.length - 1;
  $("ticks").replaceChildren(...models.map(({ size }) => {
    const tick = element("span", {}, size);
    tick.dataset.size = size;
    return tick;
  }));
  for (const { size } of [...models].reverse()) {
    const square = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const side = Math.max(3, (98 * size) / all);
    for (const [name, value] of Object.entries({ x: 1, y: 1, width: side, height: side, rx: Math.min(2, side / 5) })) {
      square.setAttribute(name, value);
    }
    square.dataset.size = size;
    $("nested").append(square);
  }
}

// --------------------------------------------------------------------------------------------------------- two widths

let wantedWidth = Infinity; // the table width that was chosen last; larger ones than the encoder mean the whole table

const cells = () => catalogue.plane.filter((cell) => cell.size === chosen().size);
const megabytes = (cell) => cell.table_bytes / 1e6;
const short = (number) => String(Number(number.toPrecision(2)));

function showPlane() {
  const row = cells();
  if (!row.length) return;
  const at = row.findLastIndex((cell) => cell.width <= wantedWidth), cell = row[at], whole = row.at(-1);
  $("width").max = row.length - 1;
  $("width").value = at;
  $("width").setAttribute("aria-valuetext", `${cell.width} dimensions`);
  $("width").style.setProperty("--filled", `${row.length > 1 ? (100 * at) / (row.length - 1) : 100}%`);
  $("width-text").textContent = `${cell.width} of ${cell.size}`;
  $("cell-bytes").textContent = `${short(megabytes(cell))} MB`;
  $("cell-time").textContent = `${short(cell.encoder_ms)} ms`;
  const share = whole.kept["NDCG@10"] ? ` ${Math.round((100 * cell.kept["NDCG@10"]) / whole.kept["NDCG@10"])}% of the whole's` : "";
  $("cell-quality").replaceChildren(cell.kept["NDCG@10"].toFixed(4), element("small", {}, cell === whole ? "" : share));
  $("cell-command").textContent = `python -m serving.export --size ${cell.size}${cell === whole ? "" : ` --table_width ${cell.width}`}`;
  for (const tr of $("cells").children) tr.classList.toggle("chosen", tr.dataset.cell === `${cell.size},${cell.width}`);
  chart($("by-bytes"), "size", megabytes, cell);
  chart($("by-time"), "width", (each) => each.encoder_ms, cell);
}

function showCells() {
  $("plane").hidden = !catalogue.plane.some((cell) => cell.width < cell.size);
  $("cells").replaceChildren(...catalogue.plane.map((cell) => {
    const metrics = [cell.kept, cell.masked].flatMap((of) => [of["NDCG@10"].toFixed(4), of["Recall@10"].toFixed(4)]);
    const numbers = [cell.width, short(megabytes(cell)), cell.encoder_ms.toFixed(2), ...metrics];
    const tr = element("tr", {}, element("th", { scope: "row" }, cell.size), ...numbers.map((n) => element("td", {}, n)));
    tr.dataset.cell = `${cell.size},${cell.width}`;
    return tr;
  }));
  $("width").oninput = () => {
    wantedWidth = cells()[$("width").value].width;
    showPlane();
  };
  new ResizeObserver(showPlane).observe($("by-bytes")); // also when it is opened
}

// Draw NDCG@10 against x(cell), a line for each value of cells[line]. The line and the point of `own` are in colour.
function chart(svg, line, x, own) {
  const width = svg.clientWidth, height = svg.clientHeight, [left, right, top, bottom] = [38, 38, 12, 26];
  if (!width) return; // it is closed
  const xs = catalogue.plane.map(x), ndcg = (cell) => cell.kept["NDCG@10"], highest = Math.max(...catalogue.plane.map(ndcg)) || 1;
  const [low, high] = [Math.min(...xs), Math.max(...xs)], range = Math.log(high / low) || 1;
  const px = (value) => left + ((width - left - right) * Math.log(value / low)) / range;
  const py = (value) => height - bottom - ((height - top - bottom) * value) / highest;
  const made = [];
  const draw = (name, attributes, text = "") => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const each of Object.entries(attributes)) node.setAttribute(...each);
    node.textContent = text;
    made.push(node);
    return node;
  };

  const step = [1, 2, 5].map((n) => n * 10 ** Math.floor(Math.log10(highest))).concat([1, 2, 5].map((n) => n * 10 ** Math.floor(Math.log10(highest) - 1)))
    .filter((n) => highest / n <= 5).sort((a, b) => a - b)[0];
  for (let value = 0; value <= highest; value += step) {
    draw("line", { class: "grid", x1: left, x2: width - right, y1: py(value), y2: py(value) });
    draw("text", { x: left - 6, y: py(value) + 4, "text-anchor": "end" }, short(value).replace(/^0\./, "."));
  }
  const powers = Array.from({ length: 20 }, (_, i) => 10 ** (i - 9));
  const ticks = powers.flatMap((power) => [1, 2, 5].map((n) => n * power)).filter((tick) => tick >= low && tick <= high);
  for (const tick of ticks.length > 1 ? ticks : [low, high]) {
    draw("text", { x: px(tick), y: height - 6, "text-anchor": "middle" }, short(tick));
  }

  const values = [...new Set(catalogue.plane.map((cell) => cell[line]))].sort((a, b) => a - b);
  const labels = [];
  for (const value of [...values.filter((each) => each !== own[line]), own[line]]) { // the chosen one on top
    const points = catalogue.plane.filter((cell) => cell[line] === value);
    const name = value === own[line] ? "line own" : "line";
    draw("polyline", { class: name, points: points.map((cell) => `${px(x(cell))},${py(ndcg(cell))}`).join(" ") });
    for (const cell of points) {
      const dot = draw("circle", { class: cell === own ? `${name} cell` : name, cx: px(x(cell)), cy: py(ndcg(cell)), r: cell === own ? 6 : 3 });
      const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
      title.textContent = `encoder ${cell.size}, table ${cell.width}: NDCG@10 ${ndcg(cell).toFixed(4)}, ${short(megabytes(cell))} MB, ${short(cell.encoder_ms)} ms`;
      dot.append(title);
    }
    const end = points.at(-1);
    labels.push(line === "size"
      ? draw("text", { class: name, x: px(x(end)), y: py(ndcg(end)) + 18, "text-anchor": "middle" }, value)
      : draw("text", { class: name, x: width - right + 8, y: py(ndcg(end)) + 4 }, value));
  }
  if (line === "width") { // all lines end at the largest encoder: move their labels apart
    labels.sort((a, b) => a.getAttribute("y") - b.getAttribute("y"));
    for (let i = labels.length - 2, y = labels.at(-1).getAttribute("y"); i >= 0; i--) {
      y = Math.min(labels[i].getAttribute("y"), y - 13);
      labels[i].setAttribute("y", y);
    }
  }
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren(...made);
}

// Make up a history: begin with an item, then take one of the best three, three times.
async function example(item, choose) {
  const items = [item];
  while (items.length < 4) {
    const { best } = await recommend(largest().size, items);
    if (!best.length) break;
    items.push(best[choose(Math.min(3, best.length))]);
  }
  return setHistory(items);
}

// The address may name a history and a size: #size=64&history=ID,ID
function readAddress() {
  const params = new URLSearchParams(location.hash.slice(1));
  const ids = (params.get("history") || "").split(",").filter(Boolean);
  const at = catalogue.models.findIndex((model) => String(model.size) === params.get("size"));
  return { ids, known: ids.map((id) => numbers.get(id)).filter(Boolean), at, given: params.has("history") };
}

let unknown = [];
function unknownIds() {
  const [ids, given] = [unknown, unknown.length];
  unknown = [];
  const rest = history.length ? "" : " No item of the history is known: these are the recommendations for a new visitor.";
  return given ? `Unknown and skipped: ${ids.slice(0, 5).join(", ")}${given > 5 ? ` and ${given - 5} more` : ""}.${rest}` : "";
}

function fail(error) {
  if (!(error instanceof PageError)) console.error(error);
  say(error instanceof PageError ? error.message : `The model could not run: ${error.message}`);
  for (const id of ["milliseconds", "same"]) $(id).textContent = "–";
  $("changes").textContent = "";
  $("best").replaceChildren();
}

async function start() {
  if (typeof WebAssembly !== "object") {
    throw new PageError("This browser has no WebAssembly, or it is turned off. The model needs it; please use another browser.");
  }
  const text = await (await read("catalogue.json")).text();
  try {
    catalogue = JSON.parse(text);
  } catch {
    throw damaged("catalogue.json", "it is not JSON");
  }
  const runtime = "./ort/ort.wasm.min.mjs";
  ort = await import(runtime).catch(() => { throw damaged(runtime.slice(2), "it is missing or no module"); });
  ort.env.wasm.wasmPaths = new URL("ort/", import.meta.url).href;
  ort.env.wasm.numThreads = 1; // more would need headers that plain file servers do not send
  numbers = new Map(catalogue.ids.map((id, at) => [id, at + 1]));
  $("dataset").textContent = `${catalogue.dataset}: ${catalogue.ids.length.toLocaleString("en")} items, ${catalogue.models.length} sizes`;
  showScale();
  showCells();
  const { ids, known, at, given } = readAddress();
  $("slider").value = at >= 0 ? at : Math.floor(catalogue.models.length / 2);
  $("slider").oninput = () => setHistory(history);
  $("clear").onclick = () => setHistory([]);
  $("example").onclick = () => example(1 + Math.floor(Math.random() * catalogue.ids.length), (n) => Math.floor(Math.random() * n)).catch(fail);
  $("search").oninput = () => { shown = PAGE; showCatalogue(); };
  $("more").onclick = () => { shown += PAGE; showCatalogue(); };
  unknown = ids.filter((id) => !numbers.has(id));
  showSize();
  showCatalogue();
  $("app").hidden = false;
  await (given ? setHistory(known) : example(1, () => 0));
}

export const ready = start().catch(fail);
