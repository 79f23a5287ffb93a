// Charts and clips of the comparison. The data is in the element before; captions are never parsed as HTML.
const D = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const PER_PAGE = 20;
let page = 0, rows = [];

function add(parent, tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.append(text);
  if (className) made.className = className;
  parent.append(made);
  return made;
}

function both(parent, english, korean) { // text in both languages
  add(parent, "span", english).lang = "en";
  add(parent, "span", korean).lang = "ko";
}

function caption(parent, text, references) { // with marks on words that no reference contains
  const known = new Set(references.join(" ").normalize("NFC").split(/\s+/));
  for (const word of text.normalize("NFC").split(/(\s+)/)) {
    if (word.trim() && !known.has(word)) add(parent, "mark", word);
    else parent.append(word);
  }
}

function select() {
  const wanted = $("filter").value.normalize("NFC").toLowerCase(), order = $("sort").value;
  const text = c => [c.key, ...c.refs, ...c.caps].join(" ").normalize("NFC").toLowerCase();
  rows = wanted ? D.clips.filter(c => text(c).includes(wanted)) : [...D.clips];
  if (order === "spread") rows.sort((a, b) => b.spread - a.spread);
  else if (order !== "order") rows.sort((a, b) => (b.scores[+order] ?? -1) - (a.scores[+order] ?? -1));
  page = 0;
  show();
}

function show() {
  const last = Math.max(0, Math.ceil(rows.length / PER_PAGE) - 1);
  page = Math.min(Math.max(page, 0), last);
  $("previous").disabled = page === 0;
  $("next-page").disabled = page === last;
  const status = $("page");
  status.replaceChildren();
  both(status, `page ${page + 1} of ${last + 1}, ${rows.length} clips`, `${page + 1} / ${last + 1}쪽, 클립 ${rows.length}개`);
  const box = $("clips");
  box.replaceChildren();
  for (const clip of rows.slice(page * PER_PAGE, (page + 1) * PER_PAGE)) showClip(add(box, "article", undefined, "clip"), clip);
}

function showClip(box, clip) {
  const left = add(box, "div");
  if (clip.image) {
    const image = add(left, "img");
    image.alt = root.lang === "ko" ? `${clip.key}의 프레임` : `frames of ${clip.key}`;
    image.src = "data:image/jpeg;base64," + clip.image;
  }
  add(left, "h4", clip.key, "key");
  if (clip.seconds) both(add(left, "small"), `${clip.seconds.toFixed(1)} s`, `${clip.seconds.toFixed(1)}초`);
  const list = add(box, "dl");
  for (const reference of clip.refs) {
    both(add(list, "dt"), "reference", "정답 캡션");
    add(list, "dd", reference).dir = "auto";
  }
  clip.caps.forEach((text, i) => {
    add(list, "dt", D.groups[i]);
    const place = add(list, "dd");
    caption(place, text, clip.refs);
    add(place, "small", ` ${clip.scores[i] ?? "—"}`);
  });
}

function colour(name) { // of a variable, as it is now
  const probe = add(document.body, "span");
  probe.style.color = `var(${name})`;
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

function draw(name) {
  if (!window.Plotly) add(document.head, "script", $("plotly").textContent);
  const chart = D.charts[name], layout = chart.figure.layout, titles = chart.titles[root.lang], line = colour("--line");
  const axis = { gridcolor: line, linecolor: line, zerolinecolor: line, automargin: true };
  Plotly.react(name, chart.figure.data, {
    ...layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: colour("--ink"), size: 12 },
    legend: { orientation: "h", yanchor: "bottom", y: 1.02, ...layout.legend },
    xaxis: { ...layout.xaxis, ...axis, title: { text: titles[0] } },
    yaxis: { ...layout.yaxis, ...axis, title: { text: titles[1] } },
  }, { responsive: true, displayModeBar: false });
}

// A chart is drawn when it comes near the screen, and the library only then, so that the page opens at once.
const drawn = new Set();
const near = new IntersectionObserver(entries => {
  for (const { isIntersecting, target } of entries)
    if (isIntersecting && !drawn.has(target.id)) {
      drawn.add(target.id);
      draw(target.id);
    }
}, { rootMargin: "400px" });
document.querySelectorAll(".chart").forEach(box => near.observe(box));
addEventListener("beforeprint", () => Object.keys(D.charts).forEach(draw));
redraw.push(() => drawn.forEach(draw), show);
$("filter").oninput = select;
$("sort").onchange = select;
$("previous").onclick = () => { page--; show(); };
$("next-page").onclick = () => { page++; show(); };
select();
