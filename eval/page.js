addEventListener("error", event => {
  const note = document.getElementById("broken");
  note.textContent = `Items cannot be shown: ${event.message}. Write the page anew with python -m eval.page.`;
  note.hidden = false;
});
const read = id => JSON.parse(document.getElementById(id).textContent);
const items = read("items-data"), pictures = read("pictures-data"), names = read("names-data");
const list = document.getElementById("items"), more = document.getElementById("more");
const filters = document.getElementById("filters"), count = document.getElementById("count");
const CHUNK = 30;  // items that are built at a time
let found = [], built = 0;

const element = (tag, text, kind) => {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
};
const copy = id => document.getElementById(id).content.firstElementChild.cloneNode(true);
const written = number => number.toLocaleString("en");
const SIGNS = { wrong: "✗ wrong", right: "✓ right", unparsed: "? unparsed", missing: "– no answer" };
const TITLES = { hallucinated: "not in the picture", correct: "in the picture" };

function answerOf(answer, number) {
  const box = copy("answer");
  box.classList.add(answer.outcome);
  box.querySelector(".name").textContent = names[number];
  box.querySelector(".outcome").textContent = SIGNS[answer.outcome];
  const text = box.querySelector(".text");
  for (const [piece, kind] of answer.pieces) {
    if (!kind) { text.append(piece); continue; }
    const mark = element("mark", piece, kind);
    mark.title = TITLES[kind];
    text.append(mark);
  }
  if (!answer.pieces.length) text.append(element("i", "empty answer"));
  box.querySelector(".facts").textContent = answer.facts.join(" · ");
  const verdicts = box.querySelector(".verdicts");
  if (answer.verdicts.length) for (const verdict of answer.verdicts) verdicts.append(element("p", verdict));
  else verdicts.remove();
  return box;
}

function cardOf(item) {
  const card = copy("item"), picture = pictures[item.picture], frame = card.querySelector(".picture");
  if (picture) {
    const [url, width, height] = picture;
    const image = Object.assign(element("img"), { loading: "lazy", decoding: "async", alt: `Picture ${item.image}` });
    Object.assign(image, { width, height, src: url });
    frame.append(image);
  } else frame.append(element("p", item.image ? `${item.image}: not there` : "no picture", "small"));
  card.setAttribute("aria-label", `Item ${item.id}`);
  card.querySelector(".id").textContent = item.id;
  for (const tag of item.tags) card.querySelector(".meta").append(element("span", tag, "tag"));
  card.querySelector(".prompt").textContent = item.prompt;
  for (const truth of item.truth) card.querySelector(".truth").append(element("span", truth));
  if (!item.truth.length) card.querySelector(".truth").append(element("i", "nothing"));
  if (item.context) card.querySelector(".context p").textContent = item.context;
  else card.querySelector(".context").remove();
  item.answers.forEach((answer, number) => card.querySelector(".answers").append(answerOf(answer, number)));
  return card;
}

function build() {
  const part = found.slice(built, built + CHUNK);
  list.append(...part.map(cardOf));
  built += part.length;
  more.hidden = built >= found.length;
  more.textContent = `Show more (${written(found.length - built)})`;
  watcher.unobserve(more);  // and observe anew, which tells at once when the end is still in sight
  watcher.observe(more);
}

const textOf = item => item.text ??= [
  item.id, item.image, item.prompt, ...item.truth, ...item.tags,
  ...item.answers.flatMap(answer => [answer.pieces.map(piece => piece[0]).join(""), ...answer.verdicts]),
].join("\n").toLowerCase();

function choose() {
  const chosen = new FormData(filters), words = chosen.get("words").trim().toLowerCase();
  const state = chosen.get("state"), tag = chosen.get("tag");
  found = items.filter(item =>
    (!state || item.state === state) && (!tag || item.tags.includes(tag)) && (!words || textOf(item).includes(words)));
  list.replaceChildren();
  built = 0;
  count.textContent = `${written(found.length)} of ${written(items.length)} items`;
  document.getElementById("none").hidden = found.length > 0;
  build();
}

function step(by) {
  const cards = [...list.children], at = cards.indexOf(document.activeElement.closest(".item"));
  const next = cards[Math.max(0, at + by)];
  if (next) { next.focus({ preventScroll: true }); next.scrollIntoView({ block: "start" }); }
}

const watcher = new IntersectionObserver(
  entries => { if (entries.at(-1).isIntersecting && !more.hidden) build(); }, { rootMargin: "1200px" });
more.addEventListener("click", build);
for (const field of filters.querySelectorAll("input, select"))
  field.addEventListener(field.type === "search" ? "input" : "change", choose);
filters.addEventListener("submit", event => event.preventDefault());
filters.addEventListener("reset", () => setTimeout(choose));
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input[type=search], select")) return;
  const keys = { "/": () => filters.elements.words.focus(), j: () => step(1), k: () => step(-1) };
  if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
});
choose();
