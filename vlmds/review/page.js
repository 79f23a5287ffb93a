"use strict";
// The review page: one pair at a time. The next pair and its clip are fetched while this one is shown.

const {texts, marks: MARKS} = JSON.parse(document.getElementById("given").textContent);
const MARK_KEYS = {left: ["KeyA", "KeyS", "KeyD", "KeyF", "KeyG"], right: ["KeyH", "KeyJ", "KeyK", "KeyL", "Semicolon"]};
const SIDES = ["left", "right"];
const NARROW = matchMedia("(max-width: 480px)");
const RETRY = 2000;  // milliseconds

const $ = (id) => document.getElementById(id);
const stored = (key, value) => {  // not where storage is blocked
  try {
    if (value === undefined) return localStorage.getItem(key);
    localStorage.setItem(key, value);
  } catch { return null; }
};

let language = stored("vlmds-language") || (navigator.language.startsWith("ko") ? "ko" : "en");
let name = stored("vlmds-reviewer") || "";
let pair = null, upcoming = null, progress = null, busy = false, shownAt = 0, correctedSide = null;
let notice = null;                 // [name of a text, values]
const fetched = new Map();         // pair id -> element of its clip, fetched ahead

function text(key, values = {}) {
  return texts[language][key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// Texts

function translate() {
  document.documentElement.lang = language;
  document.title = text("title");
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = text(element.dataset.text);
  $("language").lang = language === "ko" ? "en" : "ko";
  $("bar").setAttribute("aria-label", text("progress"));
  showProgress();
  say(notice);
  if (pair) { showAbout(); for (const side of SIDES) showCaption(side, marksOf(side)); }
}

function say(what, element) {
  notice = what;
  $("status").textContent = what ? text(what[0], {...what[1], error: what[1]?.error?.[language]}) : "";
  $("status").className = what && what[0] !== "pair_shown" ? "notice" : "hidden";
}

function duration(seconds) {
  const minutes = Math.max(1, Math.round(seconds / 60));
  return minutes < 60 ? text("minutes", {minutes}) : text("hours", {hours: Math.floor(minutes / 60), minutes: minutes % 60});
}

function clock(seconds) {
  const whole = Math.floor(seconds), part = Math.round((seconds - whole) * 10);
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}${part && part < 10 ? `.${part}` : ""}`;
}

function showProgress() {
  $("progress").hidden = !progress;
  if (!progress) return;
  const {answered, left, seconds} = progress;
  $("bar").max = answered + left || 1;
  $("bar").value = answered;
  $("counts").textContent = text("answered", progress) + (seconds && left ? text("time_left", {time: duration(seconds)}) : "");
}

// Requests

async function send(action, body, until_saved) {
  for (;;) {
    try {
      const reply = await fetch(`api/${action}`, {
        method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify({reviewer: name, ...body}),
      });
      if (reply.ok) return await reply.json();
      if (reply.status === 403) say(["forbidden"]);
      else {
        say(["failed", {error: (await reply.json()).error}]);
        if (reply.status < 500) return null;
      }
    } catch { say(["offline"]); }
    if (!until_saved) return null;
    await new Promise((done) => setTimeout(done, RETRY));
  }
}

async function request(action, body = {}, until_saved = false) {
  if (busy) return null;
  busy = true;
  document.body.setAttribute("aria-busy", "true");
  const asked = performance.now();
  try {
    const found = await send(action, body, until_saved);
    if (found && "progress" in found) show(found, asked);
    return found;
  } finally {
    busy = false;
    document.body.removeAttribute("aria-busy");
  }
}

// A pair

function show(found, asked) {
  pair = found.pair; upcoming = found.upcoming; progress = found.progress;
  say(found.replaced ? ["replaced"] : found.undone ? ["undone"] : found.undone === false ? ["nothing_to_undo"] : pair ? ["pair_shown"] : null);
  showProgress();
  $("start").hidden = true;
  $("review").hidden = !pair;
  $("done").hidden = Boolean(pair);
  if (!pair) { $("media").replaceChildren(); prepare(null); return; }
  const draft = readDraft() || pair.answer || {};
  for (const side of SIDES) showCaption(side, draft.marks?.[side] || []);
  for (const button of document.querySelectorAll("[data-choice]")) {
    button.setAttribute("aria-pressed", String(button.dataset.choice === pair.answer?.choice));
  }
  edit(draft.corrected?.side || null, draft.corrected?.text, false);
  showReferences(pair.references);
  showClip();
  shownAt = performance.now();
  performance.measure("pair shown", {start: asked, end: shownAt});
  $("clip-title").focus({preventScroll: true});
  window.scrollTo(0, 0);
  prepare(upcoming);
}

function showCaption(side, checked) {
  const number = SIDES.indexOf(side) + 1, caption = pair.captions[side];
  const list = MARKS.map((mark, place) => make("label", {},
    make("input", {type: "checkbox", name: side, value: mark, checked: checked.includes(mark), onchange: saveDraft}),
    text(mark),
    make("kbd", {textContent: MARK_KEYS[side][place].replace("Key", "").replace("Semicolon", ";")}),
  ));
  $(side).replaceChildren(
    make("h3", {textContent: text("caption", {number})}),
    make("p", {lang: caption ? "ko" : language, textContent: caption || text("empty")}),
    // On a telephone closed, so that both captions are on the screen.
    make("details", {open: !NARROW.matches || checked.length > 0},
      make("summary", {textContent: text("marks")}), make("fieldset", {ariaLabel: text("marks")}, ...list),
      make("div", {className: "row"}, make("button", {type: "button", className: "plain", onclick: () => edit(side)},
        make("span", {textContent: text("correct", {number})}), " ", make("kbd", {textContent: number === 1 ? "E" : "R"})))),
  );
}

function marksOf(side) {
  return [...document.querySelectorAll(`input[name=${side}]:checked`)].map((box) => box.value);
}

function showReferences(references) {
  $("reference").hidden = !references;
  $("ask").hidden = Boolean(references);
  $("references").replaceChildren(...(references || []).map((each) => make("li", {textContent: each})));
}

async function askReference() {
  if (busy || !$("reference").hidden) return;
  const about = pair.id, found = await send("references", {pair: about});
  if (found && pair?.id === about) showReferences(found.references);
}

function edit(side, value, focus = true) {
  correctedSide = side;
  $("editor").hidden = !side;
  if (!side) { $("corrected").value = ""; saveDraft(); return; }
  $("corrected").value = value ?? pair.captions[side];
  if (focus) $("corrected").focus();
}

function correction() {
  const value = $("corrected").value.trim();
  return correctedSide && value && value !== pair.captions[correctedSide] ? {text: value, side: correctedSide} : null;
}

function draftKey() { return `vlmds-draft ${name} ${pair.id}`; }

function readDraft() {
  try { return JSON.parse(sessionStorage.getItem(draftKey())); } catch { return null; }
}

function saveDraft() {
  const draft = {marks: {left: marksOf("left"), right: marksOf("right")}, corrected: correction()};
  const empty = !draft.corrected && !draft.marks.left.length && !draft.marks.right.length;
  try {
    if (empty) sessionStorage.removeItem(draftKey());
    else sessionStorage.setItem(draftKey(), JSON.stringify(draft));
  } catch { /* storage is blocked */ }
}

async function answer(choice) {
  if (!pair || busy) return;
  const key = draftKey();
  const body = {pair: pair.id, choice, marks: {left: marksOf("left"), right: marksOf("right")}, corrected: correction(),
                seconds: Math.min(86400, (performance.now() - shownAt) / 1000)};
  if (await request("answer", body, true)) { try { sessionStorage.removeItem(key); } catch { /* blocked */ } }
}

// The clip

function clipElement(shown) {
  const {kind, start, end, encode, count} = shown.media, url = `clip/${shown.id}`;
  if (kind === "picture") return make("img", {src: url, alt: text("clip")});
  if (kind === "frames") {
    const frames = Array.from({length: count}, (_, number) =>
      make("img", {src: `${url}/${number}.jpg`, alt: text("frame", {number: number + 1, count})}));
    return make("div", {className: "frames"}, ...frames);
  }
  if (kind !== "video") return make("p", {textContent: kind === "none" ? text("no_video") : text("unreadable", shown.media)});
  const video = make("video", {controls: true, muted: true, playsInline: true, preload: "auto"});
  const span = {start, end};
  const load = (encoded) => {
    if (encoded) Object.assign(span, {start: 0, end: end - start});
    video.dataset.encoded = encoded ? "yes" : "";
    video.src = encoded ? `${url}/encoded` : url;
  };
  video.span = span;
  video.addEventListener("loadedmetadata", () => { if (span.start) video.currentTime = span.start; });
  let before = 0;
  video.addEventListener("timeupdate", () => {  // at the end of the span, not where the reviewer has moved past it
    if (before < span.end && video.currentTime >= span.end && video.currentTime - before < 1 && !video.paused) fromStart(video);
    before = video.currentTime;
  });
  video.addEventListener("ended", () => fromStart(video));
  video.addEventListener("error", async () => {
    if (!video.hasAttribute("src")) return;  // released
    const encoded = Boolean(video.dataset.encoded);
    const reply = await fetch(video.src, {headers: {Range: "bytes=0-0"}}).catch(() => null);  // why
    const again = (encoded) => {
      if (!video.hasAttribute("src")) return;
      load(encoded);
      if (video.isConnected) { showAbout(); play(video); }
    };
    if (!reply) { setTimeout(again, RETRY, encoded); return; }
    if (reply.ok && !encoded) { again(true); return; }
    const why = reply.ok ? String(video.error?.message || "") : (await reply.json()).error[language];
    const message = make("p", {textContent: text("unreadable", {why})});
    if (fetched.has(shown.id)) fetched.set(shown.id, message);
    video.replaceWith(message);
  });
  load(encode);
  return video;
}

function play(video) {
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) video.play().catch(() => {});
}

function fromStart(video) {
  video.currentTime = video.span.start;
  video.play().catch(() => {});
}

function prepare(next) {
  for (const [id, element] of [...fetched]) {
    if (id === next?.id || id === pair?.id) continue;
    fetched.delete(id);
    if (element.tagName === "VIDEO") {  // ends its request: a browser has only a few at a time
      element.removeAttribute("src");
      element.load();
    }
  }
  if (next && !fetched.has(next.id)) fetched.set(next.id, clipElement(next));
}

function showClip() {
  if (!fetched.has(pair.id)) fetched.set(pair.id, clipElement(pair));
  const element = fetched.get(pair.id), asked = performance.now();
  $("media").replaceChildren(element);
  const video = element.tagName === "VIDEO" ? element : null;
  $("play").hidden = !video;
  if (video) {
    const measured = () => performance.measure("clip playing", {start: asked, end: performance.now()});
    video.addEventListener("playing", measured, {once: true});
    play(video);
    video.addEventListener("loadeddata", showAbout, {once: true});
  }
  showAbout();
}

function showAbout() {
  const {kind, start, end, count} = pair.media, video = $("media").querySelector("video");
  let about = "";
  if (kind === "frames" && count > 1) about = text("frames", {count});
  else if (video && !video.readyState && video.dataset.encoded) about = text("encoding");
  else if (video && !video.dataset.encoded && (start > 0 || end < video.duration - 0.1)) {
    about = text("clip_of", {start: clock(start), end: clock(end)});
  }
  $("about").textContent = about;
}

// Keys and buttons

const ACTIONS = {
  Digit1: () => answer("left"), Digit2: () => answer("right"), Digit3: () => answer("both_good"), Digit0: () => answer("both_bad"),
  KeyE: () => edit("left"), KeyR: () => edit("right"), KeyT: askReference,
  ArrowRight: () => skip(), ArrowLeft: () => undo(),
  KeyP: () => { const video = $("media").querySelector("video"); if (video) fromStart(video); },
  Space: () => { const video = $("media").querySelector("video"); if (video) video.paused ? video.play() : video.pause(); },
};
for (const side of SIDES) MARK_KEYS[side].forEach((code, place) => {
  ACTIONS[code] = () => document.querySelectorAll(`input[name=${side}]`)[place].click();
});

function skip() { if (pair) request("skip", {pair: pair.id}); }
function undo() { request("undo"); }

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || !progress) return;
  const {target} = event, code = event.code.replace("Numpad", "Digit");
  if (target.matches("textarea, input:not([type=checkbox])")) {
    if (code === "Escape") { target.blur(); $("clip-title").focus({preventScroll: true}); }
    return;
  }
  if (target.matches("video") && code.startsWith("Arrow")) return;  // the browser's: seeking
  if (code === "Space" && target.matches("button, input, summary, video")) return;
  const action = ACTIONS[code];
  if (!action || !pair && code !== "ArrowLeft" || event.repeat) return;
  event.preventDefault();
  action();
});

for (const button of document.querySelectorAll("[data-choice]")) button.addEventListener("click", () => answer(button.dataset.choice));
for (const button of document.querySelectorAll(".undo")) button.addEventListener("click", undo);
$("skip").addEventListener("click", skip);
$("ask").addEventListener("click", askReference);
$("play").addEventListener("click", ACTIONS.KeyP);
$("discard").addEventListener("click", () => edit(null));
$("corrected").addEventListener("input", saveDraft);
$("language").addEventListener("click", () => { language = language === "ko" ? "en" : "ko"; stored("vlmds-language", language); translate(); });
$("change").addEventListener("click", askName);
$("start").addEventListener("submit", (event) => {
  event.preventDefault();
  name = $("who").value.trim();
  stored("vlmds-reviewer", name);
  begin();
});

function askName() {
  pair = progress = null;
  for (const id of ["review", "done", "change", "name"]) $(id).hidden = true;
  showProgress();
  $("media").replaceChildren();
  $("start").hidden = false;
  $("who").value = name;
  $("who").focus();
}

async function begin() {
  say(null);
  if (!(await request("next"))) return askName();
  $("name").textContent = name;
  for (const id of ["change", "name"]) $(id).hidden = false;
}

translate();
name ? begin() : askName();
