const SHOWN = 200;
const student = (id) => data.student[id] ?? `id ${id}`;
const teacher = (id) => data.teacher[id] ?? `id ${id}`;
const code = (text) => make("code", {}, make("bdi", {}, text));
const ROW = { token: 0, kind: 1, rule: 2, pieces: 3, columns: 4, weights: 5, cell: 6, nodes: 7 };
const haystack = data.rows.map((row) =>
  `${student(row[ROW.token])} ${row[ROW.columns].map(teacher).join(" ")} ${row[ROW.pieces].map(teacher).join(" ")}`.toLowerCase());

const list = (ids, total, name) => {
  const parts = ids.flatMap((id, at) => at ? [" ", code(name(id))] : [code(name(id))]);
  return total > ids.length ? [...parts, ` and ${count(total - ids.length)} more`] : parts;
};

const nodeTable = ([prefix, ways, otherWays, otherTokens], pieces, token) => {
  const next = pieces[prefix.length];
  const lines = ways.map(([piece, size, some]) => {
    const own = piece < 0 ? next === undefined : piece === next;
    return make("tr", { class: own ? "own strong" : null },
      make("th", { scope: "row" }, ...(piece < 0 ? ["ends here"] : [code(teacher(piece))]), own ? make("span", { class: "hidden" }, " (this token)") : null),
      make("td", {}, ...list(some, size, student)), make("td", { class: "number" }, count(size)));
  });
  if (otherWays && next !== undefined && !ways.some(([piece]) => piece === next)) {
    lines.push(make("tr", { class: "own strong" }, make("th", { scope: "row" }, code(teacher(next)), make("span", { class: "hidden" }, " (this token)")),
      make("td", {}, code(student(token)), " among the others"), make("td")));
  }
  if (otherWays) lines.push(make("tr", {}, make("th", { scope: "row" }, `${count(otherWays)} other ways`), make("td"), make("td", { class: "number" }, count(otherTokens))));
  return make("table", {}, make("caption", {}, "after ", ...list(prefix, prefix.length, teacher)),
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "Goes on"), make("th", { scope: "col" }, "Student tokens"), make("th", { scope: "col", class: "number" }, "Number"))),
    make("tbody", {}, ...lines));
};

const story = byId("story");
const close = () => {
  story.classList.remove("open");
  document.body.classList.remove("opened");
  document.querySelector("#rows tr.chosen button")?.focus({ preventScroll: true });
};
const tell = (at, opened) => {
  const row = data.rows[at];
  const [token, kind, rule, pieces, columns, weights, cell, nodes] = row;
  const name = data.rules[rule];
  for (const line of byId("rows").children) {
    const chosen = Number(line.dataset.row) === at;
    line.classList.toggle("chosen", chosen);
    line.querySelector("button").setAttribute("aria-pressed", String(chosen));
  }
  const button = make("button", { type: "button", class: "plain close" }, "Close");
  button.addEventListener("click", close);
  const weightLines = columns.map((column, index) => make("tr", {}, make("th", { scope: "row" }, code(teacher(column))),
    make("td", { class: "number" }, weights[index].toFixed(4)), make("td", {}, meter(weights[index], "three")), make("td", { class: "number" }, String(column))));
  const cellInfo = cell < 0 ? null : data.cells[cell];
  story.replaceChildren(
    make("h2", {}, make("span", {}, code(student(token))), button),
    make("p", { class: "hint" }, `Student id ${token}, ${data.classes[kind]}. Rule ${name}: ${data.reasons[name] ?? ""}.`),
    make("h3", {}, "Pieces"),
    make("p", {}, ...(pieces.length ? list(pieces, pieces.length, teacher) : ["The teacher has none for it."])),
    make("h3", {}, "Weights: its row of W"),
    columns.length ? make("table", {}, make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "Teacher token"), make("th", { scope: "col", class: "number" }, "Weight"),
      make("th", { scope: "col" }, make("span", { class: "hidden" }, "as a bar")), make("th", { scope: "col", class: "number" }, "Id"))), make("tbody", {}, ...weightLines))
      : make("p", {}, "The row is empty: its probability is left out."),
    make("h3", {}, "Cell: what exact KL compares it in"),
    cellInfo ? make("p", {}, "The cell of ", code(teacher(cell)), `, of ${count(cellInfo[0])} student ${cellInfo[0] === 1 ? "token" : "tokens"}: `, ...list(cellInfo[1], cellInfo[0], student), ".")
      : make("p", {}, data.lacking.cells ?? "None: no text token of the teacher stands for it."),
    make("h3", {}, "Neighbours in the trie: what prefix KL tells apart"),
    ...(nodes.length ? nodes.map((node) => nodeTable(data.nodes[node], pieces, token)) : [make("p", {}, data.lacking.tries ?? "Nothing to decide along its pieces: no other token shares them.")]));
  story.scrollTop = 0;
  if (opened) {
    story.classList.add("open");
    document.body.classList.add("opened");
    document.querySelector("#rows tr.chosen")?.scrollIntoView({ block: "nearest" }); // not under it
  }
};

const search = () => {
  const wanted = byId("search").value.trim().toLowerCase();
  const kind = data.classes.indexOf(byId("class").value);
  const rule = data.rules.indexOf(byId("rule").value);
  const found = [];
  data.rows.forEach((row, at) => {
    if (haystack[at].includes(wanted) && (kind < 0 || row[ROW.kind] === kind) && (rule < 0 || row[ROW.rule] === rule)) found.push(at);
  });
  // The token itself, then the shortest that hold it: who looks for 201 means the token 201.
  const size = (at) => student(data.rows[at][ROW.token]).length + (student(data.rows[at][ROW.token]).toLowerCase().includes(wanted) ? 0 : 1000);
  if (wanted) found.sort((a, b) => size(a) - size(b) || a - b);
  byId("rows").replaceChildren(...found.slice(0, SHOWN).map((at) => {
    const row = data.rows[at];
    const button = make("button", { type: "button", class: "token", "aria-pressed": "false", "aria-controls": "story" }, make("bdi", {}, student(row[ROW.token])));
    button.addEventListener("click", () => tell(at, true));
    const entries = row[ROW.columns].map((column, index) => make("span", { class: "entry" }, code(teacher(column)), make("span", {}, row[ROW.weights][index].toFixed(4))));
    return make("tr", { "data-row": at }, make("td", { class: "number" }, String(row[ROW.token])), make("td", {}, button), make("td", {}, data.rules[row[ROW.rule]]),
      make("td", {}, ...(entries.length ? entries : ["nothing"])));
  }));
  byId("found").textContent = found.length > SHOWN ? `${count(found.length)} rows, the first ${SHOWN} shown` : found.length === 1 ? "1 row" : `${count(found.length)} rows`;
  if (found.length) tell(found[0], false);
  else story.replaceChildren(make("p", {}, "No row on this page holds it."));
};
for (const id of ["class", "rule"]) byId(id).addEventListener("input", search);
byId("search").addEventListener("input", () => { byId("rule").value = ""; search(); });
byId("search-form").addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && story.classList.contains("open")) close(); });
search();
