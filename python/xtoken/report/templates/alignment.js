const buttons = [...document.querySelectorAll("button.chunk")];
const detail = byId("detail");
const NAMES = { "p-kl": "P\u2011KL", "prefix-kl": "Prefix KL", "exact-kl": "Exact KL", "h-kl": "H\u2011KL", gold: "GOLD", uld: "ULD", alm: "ALM",
  bpm: "BPM", escd: "ESCD", "strict-top-k": "Strict top\u2011k", "partition-kl": "Partition KL", "same-vocab-kl": "Same\u2011vocabulary KL" };
const SAYS = {
  "p-kl": "The student's distribution goes through W into the teacher's vocabulary and is compared there.",
  "prefix-kl": "The first piece, then at each further piece which way the tokens go on.",
  "exact-kl": "Groups of student tokens, from the teacher's word on the student's own next token.",
  "h-kl": "Pairs of tokens that W joins, by their part of the KL; all others rank by rank, whatever they spell.",
  gold: "Tokens of the same bytes, by their part of the KL; all others rank by rank, whatever they spell.",
  uld: "Both sides sorted, and the difference at each rank, whatever the tokens spell.",
  alm: "How likely each side takes the whole chunk to be, as a coin toss.",
  bpm: "Each teacher token counts for the longest student token that its bytes go on with; what has none is in the complement.",
  escd: "The root as in BPM; then, for teacher tokens that the token before began, the student's mass of all that completes them.",
  "strict-top-k": "The student's likeliest tokens among those that both sides have, from the student's side: a reverse KL.",
  "partition-kl": "The chunk itself, what else both sides can name there, and all the rest.",
  "same-vocab-kl": "Token by token in one vocabulary.",
};
// The losses that stay open from chunk to chunk; of many, the first, so that all values are in sight.
const opened = new Set(data.models.includes("teacher") ? ["p-kl"] : ["p-kl", "prefix-kl", "exact-kl"]);
let pinned = null;

const bytesOf = (hex) => hex.replace(/(..)(?=.)/g, "$1 ");
const tokenRows = (side, [start, end]) => data.tokens[side].slice(start, end).map(([label, id, hex, prob]) =>
  make("tr", {}, make("th", { scope: "row" }, side), make("td", {}, make("code", {}, make("bdi", {}, label))),
    make("td", { class: "number" }, String(id)), make("td", { class: "mono" }, hex ? bytesOf(hex) : "none: special"),
    ...(data.models.length ? [make("td", { class: "number" }, prob === null ? "" : percent(prob))] : [])));

const swatch = (colour) => {
  const square = make("i", { class: "swatch", "aria-hidden": "true" });
  square.style.background = `var(--${colour})`;
  return square;
};
// 0 is said of nothing alone.
const short = (x) => (x === 0 ? "0" : Math.abs(x) >= 0.01 ? x.toFixed(3) : x.toPrecision(2)).replace("-", "\u2212");
const share = (x) => (x !== 0 && Math.abs(x) < 5e-4 ? "\u2248 0" : x.toFixed(3).replace("-", "\u2212"));
const total = (lines) => lines.reduce((sum, line) => sum + (line.adds ?? 0), 0);
const comparison = ({ title, lines, rest }, several) => {
  const all = rest ? [...lines, rest] : lines;
  if (!all.length) return make("h4", {}, make("bdi", {}, title));
  const has = (name) => all.some((line) => line[name] !== undefined);
  const columns = [["teacher", "Teacher", "one"], ["student", "Student", "two"], ["weight", "Weight", "three"]].filter(([name]) => has(name));
  const head = make("tr", {}, make("th", { scope: "col" }, "Token or group"), ...columns.map(([, text, colour]) => make("th", { scope: "col", class: "number" }, swatch(colour), text)),
    columns.length ? make("th", { scope: "col" }, make("span", { class: "hidden" }, "as bars")) : null,
    has("adds") ? make("th", { scope: "col", class: "number" }, "Adds") : null,
    has("tokens") ? make("th", { scope: "col", class: "number" }, "Tokens") : null);
  const rows = all.map((line) => make("tr", { class: line.own ? "own strong" : null },
    make("th", { scope: "row" }, make("bdi", {}, make("code", {}, line.label)), line.own ? make("span", { class: "hidden" }, " (what the text has)") : null),
    ...columns.map(([name]) => make("td", { class: "number" }, line[name] === undefined ? "" : name === "weight" ? line.weight.toFixed(4) : percent(line[name]))),
    columns.length ? make("td", {}, ...columns.map(([name, , colour]) => line[name] === undefined ? null : meter(line[name], colour))) : null,
    has("adds") ? make("td", { class: "number" }, line.adds === undefined ? "" : share(line.adds)) : null,
    has("tokens") ? make("td", { class: "number" }, line.tokens === undefined ? "" : count(line.tokens)) : null));
  return make("table", {}, make("caption", {}, make("bdi", {}, title), several && has("adds") ? `: adds ${share(total(all))}` : ""), make("thead", {}, head), make("tbody", {}, ...rows));
};

const lossSection = ({ loss, comparisons, value, note }) => {
  const unit = loss === "uld" ? "" : " nats";
  const summary = make("summary", {}, make("h3", {}, NAMES[loss] || loss, value === undefined ? "" : `: ${short(value)}${unit}`));
  const section = make("details", { class: "loss", open: opened.has(loss) && "" }, summary,
    make("p", { class: "hint" }, SAYS[loss] || "", note ? ` ${note[0].toUpperCase()}${note.slice(1)}.` : ""),
    ...comparisons.map((table) => comparison(table, comparisons.length > 1)));
  // A click by a key too; "toggle" comes later, when another chunk may be shown.
  summary.addEventListener("click", () => opened[section.open ? "delete" : "add"](loss));
  return section;
};

const show = (at) => {
  const chunk = data.chunks[at];
  buttons.forEach((button, index) => button.classList.toggle("shown", index === at));
  const close = make("button", { type: "button", class: "plain close" }, "Close");
  close.addEventListener("click", letGo);
  const heading = make("tr", {}, ...["Side", "Token", "Id", "Bytes"].map((text) =>
    make("th", { scope: "col", class: text === "Id" ? "number" : null }, text)),
    data.models.length ? make("th", { scope: "col", class: "number" }, "Probability") : null);
  detail.replaceChildren(
    make("h2", {}, `Chunk ${count(at + 1)} (${chunk.shape})`, close),
    make("p", { class: "hint" }, `${chunk.meaning[0].toUpperCase()}${chunk.meaning.slice(1)}`,
      chunk.whole ? `; the text is ${chunk.whole}` : "",
      chunk.counted === false ? `. In no loss: ${chunk.reason}.` : "."),
    make("table", {}, make("thead", {}, heading),
      make("tbody", {}, ...tokenRows("student", chunk.student), ...tokenRows("teacher", chunk.teacher))),
    chunk.losses.some((loss) => loss.value !== undefined) ? make("p", { class: "hint" }, "In the tables \u201cAdds\u201d is what a line adds to the loss of this chunk.") : "",
    ...chunk.losses.map(lossSection));
  detail.scrollTop = 0;
};
const open = (at) => {
  show(at);
  detail.classList.add("open");
  document.body.classList.add("opened");
  buttons[at].scrollIntoView({ block: "nearest" }); // not under the details on a phone
};
const pin = (at) => {
  pinned = at;
  buttons.forEach((button, index) => button.setAttribute("aria-pressed", String(index === at)));
  open(at);
};
const letGo = () => {
  const was = pinned;
  pinned = null;
  buttons.forEach((button) => button.setAttribute("aria-pressed", "false"));
  detail.classList.remove("open");
  document.body.classList.remove("opened");
  if (was !== null) buttons[was].focus({ preventScroll: true });
};
const focusOn = (at) => {
  buttons.forEach((button, index) => { button.tabIndex = index === at ? 0 : -1; });
  buttons[at].focus();
};
// The chunk above or below: the nearest one in the next line of the page.
const vertical = (at, step) => {
  const box = buttons[at].getBoundingClientRect();
  const centre = box.left + box.width / 2;
  let best = at, least = Infinity, line = null;
  for (let i = at + step; i >= 0 && i < buttons.length; i += step) {
    const other = buttons[i].getBoundingClientRect();
    if (Math.abs(other.top - box.top) < 4) continue;
    if (line === null) line = other.top;
    if (Math.abs(other.top - line) >= 4) break;
    const distance = Math.abs(other.left + other.width / 2 - centre);
    if (distance < least) { least = distance; best = i; }
  }
  return best;
};
buttons.forEach((button, at) => {
  button.tabIndex = at === 0 ? 0 : -1;
  button.addEventListener("mouseenter", () => { if (pinned === null) show(at); });
  button.addEventListener("focus", () => { if (pinned === null) show(at); });
  button.addEventListener("click", () => { focusOn(at); if (pinned === at) letGo(); else pin(at); });
  button.addEventListener("keydown", (event) => {
    const last = buttons.length - 1;
    const to = { ArrowRight: Math.min(at + 1, last), ArrowLeft: Math.max(at - 1, 0), Home: 0, End: last }[event.key]
      ?? (event.key === "ArrowDown" ? vertical(at, 1) : event.key === "ArrowUp" ? vertical(at, -1) : null);
    if (to === null) return;
    event.preventDefault();
    if (pinned !== null) pin(to);
    focusOn(to);
  });
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") letGo(); });
// What readers come for first: a chunk whose sides are cut differently.
const first = data.chunks.findIndex((chunk) => chunk.counted !== false && chunk.losses.length && chunk.shape !== "1:1");
if (buttons.length) show(Math.max(first, 0));
