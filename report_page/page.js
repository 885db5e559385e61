// What the page does beyond showing: tables sort, filter and page; a configuration is recommended for the reader's
// bounds; the trade-offs are drawn. Text reaches the page as text nodes, never as markup.

const MISSING = "–";
const data = JSON.parse(document.getElementById("ui-data").textContent);
// Numbers are compared as they are and shown as the study's tables have them: `texts` are made where those are.
const named = (names, values) => Object.fromEntries(names.map((name, i) => [name, values[i]]));
const rows = data.rows.map((values, i) => ({ ...named(data.columns, values), texts: named(data.shown, data.texts[i]) }));
const byId = (name) => document.getElementById(`ui-${name}`);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// --------------------------------------------------------------------------------------------------------------- tables

const collator = new Intl.Collator("en", { numeric: true });

function enhance(table) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const all = [...body.rows];
  const isLong = all.length > data.page_rows;
  let order = all;
  let page = 0;
  let tools = null;

  const buttons = heads.map((head, column) => {
    const button = element("button", { type: "button", class: "sort" }, ...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => sortBy(column));
    return button;
  });

  function keyOf(row, column) {
    const cell = row.cells[column];
    const text = cell.textContent.trim();
    if (text === MISSING || text === "") return null;
    if (!heads[column].classList.contains("n")) return text;
    const value = parseFloat(cell.dataset.v ?? text.replaceAll(",", ""));
    return Number.isNaN(value) ? null : value;
  }

  function sortBy(column) {
    const rising = heads[column].getAttribute("aria-sort") !== "ascending";
    heads.forEach((head, i) =>
      head.setAttribute("aria-sort", i !== column ? "none" : rising ? "ascending" : "descending"),
    );
    const keys = new Map(all.map((row) => [row, keyOf(row, column)]));
    const direction = rising ? 1 : -1;
    order = [...all].sort((a, b) => {
      const [x, y] = [keys.get(a), keys.get(b)];
      if (x === null || y === null) return (x === null) - (y === null); // what is missing comes last either way
      return direction * (typeof x === "number" ? x - y : collator.compare(x, y));
    });
    page = 0;
    show();
  }

  function isWanted(row) {
    if (!tools) return true;
    const words = tools.text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const text = words.length ? row.textContent.toLowerCase() : "";
    return (
      words.every((word) => text.includes(word)) &&
      tools.choices.every(([column, choice]) => !choice.value || row.cells[column].textContent === choice.value)
    );
  }

  function show() {
    const wanted = order.filter(isWanted);
    const pages = isLong ? Math.max(1, Math.ceil(wanted.length / data.page_rows)) : 1;
    page = Math.min(page, pages - 1);
    const first = page * data.page_rows;
    const shown = isLong ? wanted.slice(first, first + data.page_rows) : wanted;
    body.replaceChildren(...shown);
    if (!tools) return;
    const total = wanted.length === all.length ? `${all.length} rows` : `${wanted.length} of ${all.length} rows`;
    tools.status.textContent =
      pages > 1 ? `${total}; ${first + 1} to ${first + shown.length} shown` : wanted.length ? total : `No row: ${total}`;
    tools.before.disabled = page === 0;
    tools.after.disabled = page === pages - 1;
  }

  function makeTools() {
    const region = table.parentElement;
    const label = region.getAttribute("aria-label");
    const text = element("input", { type: "search", autocomplete: "off", spellcheck: "false" });
    const choices = [];
    const fields = [field("Rows with the words", text)];
    heads.forEach((head, column) => {
      if (head.dataset.choose === undefined) return;
      const values = [...new Set(all.map((row) => row.cells[column].textContent))].sort(collator.compare);
      if (values.length < 2 || values.length > 200) return;
      const choice = element("select", {}, element("option", { value: "" }, "all"));
      choice.append(...values.map((value) => element("option", { value }, value)));
      choices.push([column, choice]);
      fields.push(field(head.textContent, choice));
    });
    const status = element("span", { role: "status" });
    const before = element("button", { type: "button" }, "Previous");
    const after = element("button", { type: "button" }, "Next");
    const pager = element("div", { class: "pager" }, status);
    if (isLong) pager.append(before, after);
    tools = { text, choices, status, before, after };
    region.before(
      element("div", { class: "fields tools", role: "group", "aria-label": `Filter: ${label}` }, ...fields),
      pager,
    );
    const again = () => {
      page = 0;
      show();
    };
    text.addEventListener("input", again);
    choices.forEach(([, choice]) => choice.addEventListener("change", again));
    before.addEventListener("click", () => turn(-1));
    after.addEventListener("click", () => turn(1));
  }

  function turn(step) {
    page += step;
    show();
    const button = step < 0 ? tools.before : tools.after;
    if (button.disabled) (step < 0 ? tools.after : tools.before).focus(); // the focus stays in the pager
  }

  if (isLong || table.dataset.tools !== undefined) {
    makeTools();
    show();
  }
  return buttons;
}

let fields = 0;
function field(label, control) {
  control.id = `ui-field-${(fields += 1)}`;
  return element("div", { class: "field" }, element("label", { for: control.id }, label), control);
}

// ------------------------------------------------------------------------------------------------------- recommendation

const COLUMNS = [
  // heading, text of a row, whether it is a number
  ["model", (row) => data.models[row.model], false],
  ["setting", (row) => row.setting, false],
  ["accuracy %", (row) => row.texts.accuracy, true],
  ["change [CI]", (row) => row.texts.change, true],
  ["worst group %", (row) => row.texts.worst_group_accuracy, true],
  ["accuracy gap", (row) => row.texts.accuracy_gap, true],
  ["MB", (row) => row.texts.size_mb, true],
  ["ms", (row) => row.texts.latency_ms_b1, true],
  ["seeds", (row) => String(row.n_seeds), true],
];

function configurationTable(chosen, label) {
  const shown = COLUMNS.filter(([, text]) => chosen.some((row) => text(row) !== MISSING));
  const cell = (tag, isNumber, text) => element(tag, isNumber ? { class: "n" } : {}, text);
  const head = element("tr", {}, ...shown.map(([name, , isNumber]) => cell("th", isNumber, name)));
  [...head.cells].forEach((each) => each.setAttribute("scope", "col"));
  const body = chosen.map((row) =>
    element("tr", {}, ...shown.map(([, text, isNumber]) => cell("td", isNumber, text(row)))),
  );
  const table = element("table", {}, element("thead", {}, head), element("tbody", {}, ...body));
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, table);
}

function ofDataset() {
  return rows.filter((row) => row.dataset === byId("dataset").value);
}

function candidates() {
  const model = byId("model").value;
  return ofDataset().filter((row) => model === "" || row.model === model);
}

function readBounds() {
  const bounds = { prefer: byId("prefer").value };
  for (const name of Object.keys(BOUNDS)) {
    const input = byId(name);
    const value = input.value.trim() === "" ? null : Number(input.value);
    const isWrong = input.validity.badInput || (value !== null && !Number.isFinite(value));
    if (isWrong) input.setAttribute("aria-invalid", "true");
    else input.removeAttribute("aria-invalid");
    bounds[name] = isWrong ? null : value;
  }
  return bounds;
}

function boundText(name, bound) {
  const [before, after] = data.labels[name];
  const unit = name.endsWith("loss") ? (bound === 1 ? " point" : " points") : "";
  return before + bound + unit + after;
}

let recommended = null; // the row
function answer() {
  const among = candidates();
  const bounds = readBounds();
  const found = recommend(among, bounds);
  recommended = found.order.length ? among[found.order[0]] : null;
  const parts = [];
  if (recommended) {
    const preferred = byId("prefer").selectedOptions[0].textContent;
    parts.push(
      element(
        "p",
        {},
        element("strong", { id: "ui-recommended" }, `${data.models[recommended.model]} at ${recommended.setting}`),
        found.order.length === 1
          ? ` is the only one of ${found.candidates} finished configurations that holds every bound.`
          : ` has ${preferred} of the ${found.order.length} of ${found.candidates} finished configurations that hold ` +
              `every bound.`,
      ),
      configurationTable(found.order.slice(0, 5).map((i) => among[i]), "The best five, the recommended one first"),
    );
  } else {
    const text = `None of the ${found.candidates} finished configurations holds every bound.`;
    parts.push(element("p", {}, element("strong", { id: "ui-recommended" }, text)));
  }
  const told = Object.entries(found.held).map(([name, count]) =>
    element("li", {}, `${boundText(name, bounds[name])}: held by ${count} of ${found.candidates}`),
  );
  if (told.length) parts.push(element("ul", { class: "held" }, ...told));
  const reference = found.reference === null ? null : among[found.reference];
  parts.push(
    element(
      "p",
      { class: "soft" },
      reference === null
        ? "There is no finished FP32 model to count losses against."
        : `The most accurate FP32 model is ${data.models[reference.model]} (${reference.texts.accuracy} %, worst ` +
            `group ${reference.texts.worst_group_accuracy} %).`,
    ),
  );
  byId("answer").replaceChildren(...parts);
}

function setBounds() {
  byId("prefer").value = data.bounds.prefer;
  for (const name of Object.keys(BOUNDS)) byId(name).value = data.bounds[name] ?? "";
}

function fillModels() {
  const kept = byId("model").value;
  const models = [...new Set(ofDataset().map((row) => row.model))];
  const options = models.map((name) => element("option", { value: name }, data.models[name]));
  byId("model").replaceChildren(element("option", { value: "" }, "any"), ...options);
  byId("model").value = models.includes(kept) ? kept : "";
}

function showHints() {
  const measured = {
    smallest_accuracy: "accuracy",
    largest_gap: "accuracy_gap",
    largest_size_mb: "size_mb",
    largest_latency_ms: "latency_ms_b1",
  };
  for (const [name, column] of Object.entries(measured)) {
    const having = candidates().filter((row) => row[column] !== null);
    const end = (isBeyond) => having.reduce((a, b) => (isBeyond(b[column], a[column]) ? b : a)).texts[column];
    byId(`hint-${name}`).textContent = having.length
      ? `here ${end((a, b) => a < b)} to ${end((a, b) => a > b)}`
      : "not measured here";
  }
}

// ----------------------------------------------------------------------------------------------------------- trade-offs

const ACROSS = { size_mb: "file size (MB)", latency_ms_b1: "latency of one image (ms)", latency_ms_b32: "latency of 32 images (ms)" };
const UPWARDS = {
  // column -> [in words, whether more is better]
  accuracy: ["accuracy (%)", true],
  worst_group_accuracy: ["worst-group accuracy (%)", true],
  accuracy_gap: ["accuracy gap (points)", false],
  equalized_odds_difference: ["equalized odds difference (points)", false],
};
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f"];
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "x", "star", "cross", "triangle-down", "hexagon"];
const MOST_POINTS = 2000; // drawn; the front is always drawn whole
const FRONT_LISTED = 20;

// plotly reads a little markup in labels: escaped, every string is shown as it is
const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function tradeOffs() {
  const [x, y] = [byId("x").value, byId("y").value];
  const among = ofDataset().filter((row) => row[x] > 0 && row[y] !== null);
  const front = paretoFront(
    among.map((row) => [row[x], row[y]]),
    UPWARDS[y][1],
  );
  return { x, y, among, front };
}

function listFront() {
  const { among, front } = tradeOffs();
  const chosen = front.slice(0, FRONT_LISTED).map((i) => among[i]);
  const parts = chosen.length ? [configurationTable(chosen, "Configurations on the front")] : [];
  const more = front.length - chosen.length;
  if (!chosen.length) parts.push(element("p", {}, "No configuration has both values."));
  if (more) parts.push(element("p", { class: "soft" }, `and ${more} more`));
  byId("front").replaceChildren(...parts);
}

function traces({ x, y, among, front }) {
  const onFront = new Set(front);
  const order = (a, b) => (b === "FP32") - (a === "FP32") || collator.compare(b, a); // FP32, W8A8, W4A8, …
  const step = Math.ceil(among.length / MOST_POINTS);
  const drawn = among.map((row, i) => [row, i]).filter(([, i]) => i % step === 0 || onFront.has(i));
  const models = [...new Set(drawn.map(([row]) => row.model))];
  const widths = [...new Set(rows.map((row) => row.width))].sort((a, b) => order(a, b));
  const symbol = (width) => SYMBOLS[widths.indexOf(width) % SYMBOLS.length];
  byId("plot-shown").textContent =
    drawn.length < among.length
      ? `${drawn.length} of ${among.length} configurations are drawn: those on the front and every ${step}th other.`
      : "";
  const label = (row) =>
    [
      `${plain(data.models[row.model])}, ${plain(row.setting)}`,
      `accuracy ${row.texts.accuracy} %, worst group ${row.texts.worst_group_accuracy} %`,
      `gap ${row.texts.accuracy_gap}, ${row.texts.size_mb} MB, ${row.texts.latency_ms_b1} ms`,
    ].join("<br>");
  const points = models.map((model, i) => {
    const block = drawn.filter(([row]) => row.model === model).map(([row]) => row);
    return {
      type: "scatter",
      mode: "markers",
      name: plain(data.models[model]),
      x: block.map((row) => row[x]),
      y: block.map((row) => row[y]),
      text: block.map(label),
      hovertemplate: "%{text}<extra></extra>",
      marker: { size: 9, color: COLOURS[i % COLOURS.length], symbol: block.map((row) => symbol(row.width)) },
    };
  });
  const legend = widths.map((width) => ({
    type: "scatter",
    mode: "markers",
    name: plain(width),
    x: [null],
    y: [null],
    hoverinfo: "skip",
    marker: { size: 9, color: colour("soft"), symbol: symbol(width) },
  }));
  const line = {
    type: "scatter",
    mode: "lines",
    name: "front",
    x: front.map((i) => among[i][x]),
    y: front.map((i) => among[i][y]),
    hoverinfo: "skip",
    line: { color: colour("soft"), width: 1.5, dash: "dot", shape: "hv" }, // nothing lies between two of them
  };
  const ring = {
    type: "scatter",
    mode: "markers",
    name: "recommended",
    x: among.includes(recommended) ? [recommended[x]] : [],
    y: among.includes(recommended) ? [recommended[y]] : [],
    hoverinfo: "skip",
    marker: { size: 18, symbol: "circle-open", color: colour("text"), line: { width: 2.5 } },
  };
  return [line, ...points, ring, ...(widths.length > 1 ? legend : [])];
}

function draw() {
  const plotly = window.Plotly;
  if (!plotly) return;
  const shown = tradeOffs();
  const axis = { gridcolor: colour("line"), linecolor: colour("line"), zeroline: false, automargin: true };
  const layout = {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("text"), family: "system-ui, sans-serif", size: 13 },
    margin: { l: 50, r: 10, t: 10, b: 45 },
    uirevision: "kept",
    xaxis: { ...axis, type: "log", title: { text: ACROSS[shown.x] }, dtick: "D2", tickformat: "~g" },
    yaxis: { ...axis, title: { text: UPWARDS[shown.y][0] } },
    hoverlabel: { bgcolor: colour("panel"), bordercolor: colour("line"), font: { color: colour("text") } },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 12 }, entrywidth: byId("plot").clientWidth < 600 ? 88 : 105 },
    dragmode: false,
  };
  const config = { responsive: true, displaylogo: false, displayModeBar: false };
  plotly.react(byId("plot"), traces(shown), layout, config);
}

// plotly.js lies packed in the page; its hash is in the page's policy.
async function unpack() {
  const bytes = Uint8Array.from(atob(byId("plotly").textContent), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const text = await new Response(stream).text();
  document.head.append(element("script", {}, text));
  byId("plot-note").remove();
  draw();
}

function startPlot() {
  if (typeof DecompressionStream === "undefined") {
    byId("plot-note").textContent = "This browser is too old to unpack the plot; see the figures and the list below.";
    return;
  }
  const watcher = new IntersectionObserver(
    (entries) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      watcher.disconnect();
      unpack().catch((error) => {
        byId("plot").textContent = `The plot could not be drawn: ${error.message}`;
      });
    },
    { rootMargin: "300px" },
  );
  watcher.observe(byId("plot"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

function startRecommendation() {
  const datasets = [...new Set(rows.map((row) => row.dataset))];
  byId("dataset").append(...datasets.map((name) => element("option", { value: name }, name)));
  byId("dataset").closest(".field").hidden = datasets.length < 2;
  const has = (column) => rows.some((row) => row[column] !== null);
  const options = (names, text) =>
    Object.keys(names)
      .filter(has)
      .map((name) => element("option", { value: name }, text(name)));
  byId("x").append(...options(ACROSS, (name) => ACROSS[name]));
  byId("y").append(...options(UPWARDS, (name) => UPWARDS[name][0]));
  fillModels();
  setBounds();
  const canDraw = byId("x").value !== "" && byId("y").value !== "";
  const all = () => {
    showHints();
    answer();
    if (canDraw) {
      listFront();
      draw();
    }
  };
  byId("bounds").addEventListener("input", (event) => {
    if (event.target === byId("dataset")) fillModels();
    all();
  });
  byId("reset").addEventListener("click", () => {
    byId("model").value = "";
    setBounds();
    all();
  });
  byId("x").addEventListener("input", all);
  byId("y").addEventListener("input", all);
  all();
  if (canDraw) startPlot();
  else byId("plot-note").textContent = "Nothing to draw: no configuration has a size or a latency beside its accuracy.";
}

document.querySelectorAll("main table:not(.plain)").forEach(enhance);
if (rows.length) startRecommendation();
