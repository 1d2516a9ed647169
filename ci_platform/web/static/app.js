// Live pages without a framework. Pages are complete without this file; it only keeps them current.

const MOST_LINES = 20_000; // above this a log in the page gets slow; the raw log has everything

let isLive = null;

function showLive(on = isLive) {
  isLive = on;
  for (const mark of document.querySelectorAll(".live-mark")) {
    mark.classList.toggle("on", on === true);
    mark.textContent = on === null ? "" : on ? "live" : "not live";
  }
}

// --- times that tick ---

function ago(date, now) {
  const seconds = Math.max(0, Math.round((now - date) / 1000));
  if (seconds < 60) return "just now";
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86_400) return `${Math.floor(seconds / 3600)} h ago`;
  return `${Math.floor(seconds / 86_400)} d ago`;
}

function length(milliseconds) {
  const seconds = Math.max(0, milliseconds) / 1000;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 60) return `${Math.floor(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
}

function tick() {
  const now = Date.now();
  for (const time of document.querySelectorAll("time[data-ago]")) {
    time.textContent = ago(new Date(time.dateTime), now);
    time.title ||= new Date(time.dateTime).toLocaleString();
  }
  for (const running of document.querySelectorAll("[data-since]")) {
    running.textContent = length(now - new Date(running.dataset.since));
  }
}
setInterval(tick, 1000);
tick();

// --- parts of a page that the server renders again ---

async function refresh(page) {
  const response = await fetch(page.dataset.refresh, { headers: { Accept: "text/html" } });
  if (response.redirected || response.status === 401) return location.reload();
  if (!response.ok) throw new Error(`the server answered ${response.status}`);
  const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
  const parts = page.querySelectorAll("[data-part]");
  for (const part of parts.length ? parts : [page]) replace(part, fresh.getElementById(part.id));
  tick();
  showLive();
}

function replace(part, fresh) {
  // A part with a name stays as it is until the server shows another thing there: the log, which follows by itself.
  if (!fresh || (part.dataset.part && part.dataset.part === fresh.dataset.part)) return;
  // What the server sent last, not what stands in the page: ticking times change that.
  if (fresh.innerHTML === part.shown) return;
  // Do not take a half-written comment or an open menu away from whoever is using it.
  if (part.contains(document.activeElement) && document.activeElement.matches("input, textarea, select")) return;
  part.shown = fresh.innerHTML;
  part.replaceChildren(...fresh.childNodes);
  if (fresh.dataset.part) { part.dataset.part = fresh.dataset.part; startLog(); }
}

// A burst of events is one refresh, and a second one at its end.
function debounced(action, wait = 120) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(action, wait);
  };
}

const run = document.getElementById("run");
if (run?.dataset.events) {
  const again = debounced(() => refresh(run).catch(() => showLive(false)));
  const source = new EventSource(run.dataset.events);
  source.onopen = () => { showLive(true); again(); };
  source.onerror = () => showLive(false);
  source.addEventListener("history", again);
  source.addEventListener("end", () => { source.close(); again(); });
}

const polled = document.querySelector("[data-poll]");
if (polled) {
  const poll = async () => {
    if (!document.hidden) {
      try { await refresh(polled); showLive(true); } catch { showLive(false); }
    }
    setTimeout(poll, Number(polled.dataset.poll) * 1000);
  };
  document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(polled).catch(() => {}); });
  setTimeout(poll, 1000);
}

// --- the log ---

let following = null;
let unfinished = null; // the line that the next piece continues

function startLog() {
  following?.close();
  following = unfinished = chosenBefore = null;
  const log = document.getElementById("log");
  if (!log) return;
  if (log.dataset.live) following = follow(log);
  const times = document.getElementById("times");
  times?.addEventListener("change", () => log.classList.toggle("times", times.checked));
  chooseLine();
}

function follow(log) {
  const source = new EventSource(log.dataset.live);
  source.addEventListener("lines", (event) => append(log, JSON.parse(event.data).lines));
  source.addEventListener("end", () => { source.close(); keepChosenInView(); });
  return source;
}

// Lines that come in, and lines that get their real height, move the chosen one; a reader who scrolls is left alone.
let readerScrolled = false;
function keepChosenInView() {
  if (!chosenBefore || readerScrolled) return;
  chosenBefore.scrollIntoView({ block: "center" });
  requestAnimationFrame(() => { if (!readerScrolled) chosenBefore?.scrollIntoView({ block: "center" }); });
}

function append(log, lines) {
  log.querySelector(".empty")?.remove();
  const chunk = document.createElement("div");
  chunk.className = "lines";
  for (const line of lines) {
    if (unfinished?.id === `L${line.n}`) put(unfinished.querySelector(".t"), line.runs);
    else chunk.append(unfinished = lineOf(line));
    if (!line.goes_on) unfinished = null;
  }
  // How high it is before it is first drawn: chunks out of sight cost nothing.
  chunk.style.containIntrinsicSize = `auto ${chunk.childElementCount * 1.24 * 0.8}rem`;
  log.append(chunk);
  while (log.children.length > 1 && log.getElementsByClassName("line").length > MOST_LINES) log.firstElementChild.remove();
  chooseLine();
  if (document.getElementById("follow")?.checked && !chosenBefore) log.scrollIntoView({ block: "end" });
}

function lineOf({ n, at, kind, runs }) {
  const line = document.createElement("div");
  line.className = `line ${kind}`;
  line.id = `L${n}`;
  const number = document.createElement("a");
  number.className = "n";
  number.href = `#L${n}`;
  number.dataset.n = n;
  number.setAttribute("aria-label", `line ${n}`);
  const time = document.createElement("time");
  time.textContent = at;
  const text = document.createElement("span");
  text.className = "t";
  put(text, runs);
  line.append(number, time, text);
  return line;
}

// Log output is hostile: it only ever becomes text nodes.
function put(text, runs) {
  for (const [classes, piece] of runs) {
    if (!classes) { text.append(piece); continue; }
    const span = document.createElement("span");
    span.className = classes;
    span.append(piece);
    text.append(span);
  }
}

let chosenBefore = null;
function chooseLine() {
  const target = /^#L\d+$/.test(location.hash) ? document.getElementById(location.hash.slice(1)) : null;
  if (target === chosenBefore) return;
  chosenBefore?.classList.remove("chosen");
  target?.classList.add("chosen");
  target?.scrollIntoView({ block: "center" });
  chosenBefore = target;
}

addEventListener("hashchange", () => { readerScrolled = false; chooseLine(); });
// Whoever scrolls up wants to read, not to be carried away.
addEventListener("wheel", (event) => {
  readerScrolled = true;
  const box = document.getElementById("follow");
  if (event.deltaY < 0 && box) box.checked = false;
}, { passive: true });

// --- buttons that cannot be undone ---

document.addEventListener("submit", (event) => {
  const question = event.submitter?.dataset.ask;
  if (question && !confirm(question)) event.preventDefault();
});

startLog();
