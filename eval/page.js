function fail(message) {
  const note = document.getElementById("broken");
  note.textContent = `Items cannot be shown: ${message}. Write the page anew with python -m eval.page.`;
  note.hidden = false;
}
addEventListener("error", event => fail(event.message));
addEventListener("unhandledrejection", event => fail(event.reason));
const dataOf = id => document.getElementById(id).textContent;
const images = JSON.parse(dataOf("images-data")), names = JSON.parse(dataOf("names-data"));
let items = [];
const list = document.getElementById("items"), more = document.getElementById("more");
const filters = document.getElementById("filters"), count = document.getElementById("count");
const CHUNK = 30;  // items that are built at a time
let found = [], built = 0;

async function unpack(text) {  // as eval/page_items.py describes
  if (!window.DecompressionStream) throw "this browser is too old (Chrome 80, Firefox 113 or Safari 16.4 are enough)";
  const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const content = JSON.parse(await new Response(stream).text()), texts = content.texts;
  const all = numbers => numbers.map(number => texts[number]), marks = [null, "hallucinated", "correct"];
  const piecesOf = numbers => {
    const pieces = [];
    for (let i = 0; i < numbers.length; i += 2) pieces.push([texts[numbers[i]], marks[numbers[i + 1]]]);
    return pieces;
  };
  const answerFrom = ([outcome, pieces, facts, verdicts]) =>
    ({ outcome: texts[outcome], pieces: piecesOf(pieces), facts: all(facts), verdicts: all(verdicts) });
  return content.items.map(([id, image, number, prompt, truth, context, tags, state, answers]) => ({
    id: texts[id], image: texts[image], number, prompt: texts[prompt], truth: all(truth), context: texts[context],
    tags: all(tags), state: texts[state], answers: answers.map(answerFrom),
  }));
}

const element = (tag, text, kind) => {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
};
const copy = id => document.getElementById(id).content.firstElementChild.cloneNode(true);
const written = number => number.toLocaleString("en");
const SIGNS = { wrong: "✗ wrong", right: "✓ right", unparsed: "? unparsed", missing: "– no answer" };
const TITLES = { hallucinated: "not in the image", correct: "in the image" };

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
  const card = copy("item"), shown = images[item.number], frame = card.querySelector(".image");
  if (shown) {
    const [data, width, height] = shown;
    const image = Object.assign(element("img"), { loading: "lazy", decoding: "async", alt: `Image ${item.image}` });
    Object.assign(image, { width, height, src: `data:image/webp;base64,${data}` });
    frame.append(image);
  } else frame.append(element("p", item.image ? `${item.image}: missing` : "no image", "small"));
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
  watcher.unobserve(more);  // and observe anew, which reports at once when the end is still in sight
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
unpack(dataOf("items-data")).then(found => {
  items = found;
  choose();
  document.body.dataset.ready = "";
});
