// The live page. It asks the box for its state several times a second and never shows an old picture as a live one:
// whatever is not renewed in time turns grey and says how old it is.
"use strict";

const STALE_S = 3;
const LOST_S = 3;
const ANSWER_MS = 5000;
const POINTS = 600;

const SIGNS = { OK: "✓", WARN: "!", NG: "✕", INVALID: "?", unknown: "–" };
const MEANINGS = { OK: "within the limits", WARN: "above the warn limit", NG: "above the fail limit" };
const STATES = {
  up: "Live",
  connecting: "Connecting",
  damaged: "Only damaged pictures",
  stalled: "No pictures come",
  lost: "Camera lost",
  unauthorised: "Camera refuses access",
  ended: "Ended",
};
const DROPS = {
  mailbox: "replaced by newer",
  stale: "too old",
  distrusted: "damaged",
  duplicate: "repeated",
  unreadable: "unreadable",
  closed: "left at the end",
};

const byId = (id) => document.getElementById(id);
const viewer = [...crypto.getRandomValues(new Uint32Array(3))].map((part) => part.toString(36)).join("");

// ---- time ---------------------------------------------------------------------------------------------------------

// The steady clock of some phones stands still while they sleep, and the clock of the day can be set: the longer counts.
const mark = () => ({ steady: performance.now(), day: Date.now() });
const secondsSince = (at) => Math.max(performance.now() - at.steady, Date.now() - at.day) / 1000;

// ---- words --------------------------------------------------------------------------------------------------------

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const whole = (value) => Math.round(value).toLocaleString("en").replaceAll(",", " ");

function scoreText(value) {
  if (!isNumber(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e6 || (size < 1e-3 && size > 0)) return value.toExponential(2);
  return size >= 1000 ? String(Math.round(value)) : value.toPrecision(3);
}

/** A limit or a mark on an axis: 0.8, where a score would be 0.800. */
const levelText = (value) => (Math.abs(value) < 1e-9 ? "0" : scoreText(value).replace(/(\.[0-9]*?)0+(?=e|$)/, "$1").replace(/\.(?=e|$)/, ""));

function duration(seconds) {
  if (seconds < 10) return `${Math.max(0, seconds).toFixed(1)} s`;
  if (seconds < 100) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 100) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

function clock(utc) {
  const time = new Date(utc);
  if (Number.isNaN(time.getTime())) return "";
  const isToday = time.toDateString() === new Date().toDateString();
  return isToday ? time.toLocaleTimeString() : `${time.toLocaleDateString()} ${time.toLocaleTimeString()}`;
}

function setText(element, text) {
  // Untouched where nothing changed: a reader's selection stays, and the browser has less to lay out.
  if (element.textContent !== text) element.textContent = text;
}

function setLines(element, first, ...small) {
  const lines = small.filter(Boolean);
  const key = [first, ...lines].join("\n");
  if (element.dataset.lines === key) return;
  element.dataset.lines = key;
  element.replaceChildren(first, ...lines.map((line) => Object.assign(document.createElement("small"), { textContent: line })));
}

// ---- one camera ---------------------------------------------------------------------------------------------------

class Camera {
  constructor(name) {
    this.name = name;
    this.root = byId("camera-template").content.firstElementChild.cloneNode(true);
    const find = (selector) => this.root.querySelector(selector);
    this.parts = Object.fromEntries(
      ["name", "state", "verdict", "sign", "word", "why", "score", "screen", "cover", "rate", "latency", "drops", "drift"].map(
        (part) => [part, find(`.${part}`)],
      ),
    );
    this.canvas = find("canvas");
    this.summary = find(".chart figcaption");
    this.caption = find(".picture figcaption");
    this.ngList = find(".ng ol");
    this.ngTitle = find(".ng h3");
    this.ngNone = find(".ng .none");
    this.chip = document.createElement("a");
    this.chip.append(Object.assign(document.createElement("span"), { textContent: name }), document.createElement("strong"));
    this.points = [];
    this.status = {};
    this.live = null;
    this.shown = null; // the picture on the screen: what the box said about it, and when
    this.ngIds = "";
    this.pointed = null;
    [this.front, this.back] = this.root.querySelectorAll(".screen img");
    this.isLoading = false;
    setText(this.parts.name, name);
    this.canvas.addEventListener("pointermove", (event) => this.point(event.offsetX));
    this.canvas.addEventListener("pointerleave", () => this.point(null));
    new ResizeObserver(() => this.drawChart()).observe(this.canvas);
  }

  take(status, asked, nowS) {
    this.status = status;
    this.asked = asked;
    this.nowS = nowS;
    this.live = status.live;
    if (this.live) {
      const last = this.points.at(-1);
      const isNewer = (point) => !last || point[0] > last[0];
      this.points = [...this.points, ...this.live.points.filter(isNewer)]
        .filter((point) => point[0] >= this.live.first)
        .slice(-POINTS);
      this.fetchPicture();
      this.showNg();
    }
    this.showNumbers();
    this.drawChart();
  }

  forget() {
    this.points = [];
  }

  /** Seconds from one frame to the next, the middle one of the last gaps. */
  gap() {
    const times = this.points.slice(-20).map((point) => point[1]);
    const gaps = times.slice(1).map((time, index) => time - times[index]).sort((a, b) => a - b);
    return gaps.length ? gaps[Math.floor(gaps.length / 2)] : 0;
  }

  /** How old the newest verdict and the picture are now. */
  ages() {
    const passed = this.asked ? secondsSince(this.asked) : 0;
    return {
      verdict: this.live ? this.live.age_s + passed : Infinity,
      picture: this.shown ? this.shown.age_s + secondsSince(this.shown.asked) : Infinity,
    };
  }

  fetchPicture() {
    const picture = this.live.picture;
    if (!picture || this.isLoading || (this.shown && this.shown.id === picture.id)) return;
    // Two elements by turns: the one in front stays until the next picture is complete.
    const [front, back, asked] = [this.front, this.back, this.asked];
    this.isLoading = true;
    const done = (isShown) => {
      clearTimeout(limit);
      back.onload = back.onerror = null;
      this.isLoading = false;
      if (!isShown) return back.removeAttribute("src");
      back.hidden = false;
      front.hidden = true;
      [this.front, this.back] = [back, front];
      this.shown = { ...picture, asked };
      this.parts.screen.style.aspectRatio = `${picture.size[0]} / ${picture.size[1]}`;
      back.alt = `Camera ${this.name}, verdict ${picture.verdict}, heat map on top`;
      this.age();
    };
    const limit = setTimeout(() => done(false), ANSWER_MS);
    back.onload = () => done(true);
    back.onerror = () => done(false);
    back.src = `camera/${encodeURIComponent(this.name)}.jpg?shot=${picture.id}`;
  }

  /** Bring everything up to date that depends on the time alone; called even when no answer comes. */
  age() {
    const { state = "up", cause = "" } = this.status;
    const { verdict: verdictAge, picture: pictureAge } = this.ages();
    const patience = Math.max(STALE_S, Math.min(60, 4 * this.gap()));
    const isOut = link.isLost() || state !== "up";
    this.isOld = isOut || verdictAge > patience;
    const isPictureOld = isOut || pictureAge > Math.max(patience, 3 * (this.live?.picture_every_s ?? 0));

    const { parts, live } = this;
    const word = this.isOld ? "unknown" : (live?.verdict ?? "unknown");
    this.root.dataset.verdict = this.chip.dataset.verdict = word;
    setText(parts.sign, SIGNS[word] ?? "?");
    setText(parts.word, word === "unknown" ? "No verdict" : word);
    setText(this.chip.lastElementChild, word === "unknown" ? "no verdict" : word);
    if (this.isOld) setText(parts.why, live?.verdict ? `last was ${live.verdict}, ${duration(verdictAge)} ago` : "nothing judged yet");
    else setText(parts.why, live.verdict === "INVALID" ? live.reason || "for an unknown reason" : this.meaning());
    const fail = isNumber(live?.fail) ? `fails above ${levelText(live.fail)}` : "";
    setLines(parts.score, this.isOld ? "–" : scoreText(live.score), "score", fail);

    const isUp = state === "up";
    const stateText = link.isLost() ? "Not known" : isUp && this.isOld && this.live ? "No new frames" : (STATES[state] ?? state);
    setText(parts.state, stateText);
    parts.state.classList.toggle("bad", this.isOld && !["ended", "connecting"].includes(state));
    this.root.classList.toggle("lost", link.isLost());
    if (this.isOld) this.drawChart(); // its right edge is the present

    const newest = live?.ng[0];
    setText(this.ngTitle, newest ? `Last NG pictures, newest ${duration(newest.age_s + secondsSince(this.asked))} ago` : "Last NG pictures");

    parts.screen.classList.toggle("old", isPictureOld);
    const reason = link.isLost() ? "No connection to the box" : isUp ? (this.shown ? "No new picture" : "Waiting for a picture") : [stateText, cause].filter(Boolean).join(": ");
    const howOld = this.shown ? `This picture is ${duration(pictureAge)} old` : isUp ? "" : "No picture yet";
    setText(parts.cover, isPictureOld ? [reason, howOld].filter(Boolean).join("\n") : "");
    const caption = this.shown && [clock(this.shown.utc), this.shown.verdict, isNumber(this.shown.score) && `score ${scoreText(this.shown.score)}`];
    setText(this.caption, caption ? `${caption.filter(Boolean).join(" · ")} · ${duration(pictureAge)} old` : "");
  }

  meaning() {
    const { label, probability, verdict, fail } = this.live;
    if (label) return isNumber(probability) ? `${label}, ${Math.round(100 * probability)} %` : label;
    return isNumber(fail) ? MEANINGS[verdict] : "";
  }

  showNumbers() {
    const { parts, status } = this;
    const { fps, captured, scored, drops = {}, age_ms: ages = {}, drift } = status;
    setLines(parts.rate, isNumber(fps) ? `${fps.toFixed(1)} per second` : "–", isNumber(scored) && `${whole(scored)} judged of ${whole(captured)}`);
    setLines(
      parts.latency,
      isNumber(ages?.p50) ? `${Math.round(ages.p50)} ms median` : "–",
      isNumber(ages?.p95) && `95 % within ${Math.round(ages.p95)} ms`,
    );
    const causes = Object.entries(drops ?? {}).filter(([, count]) => count > 0).sort((a, b) => b[1] - a[1]);
    const total = causes.reduce((sum, [, count]) => sum + count, 0);
    const share = captured > 0 && total > 0 ? ` (${Number(((100 * total) / captured).toPrecision(2))} %)` : "";
    setLines(parts.drops, total ? `${whole(total)}${share}` : "none", ...causes.map(([cause, count]) => `${DROPS[cause] ?? cause}: ${whole(count)}`));
    this.showDrift(drift);
  }

  showDrift(drift) {
    const part = this.parts.drift;
    part.classList.toggle("bad", drift?.state === "drifting");
    if (!drift) return setLines(part, "not watched");
    const shift = isNumber(drift.shift_sigma) ? `${drift.shift_sigma < 0 ? "−" : "+"}${Math.abs(drift.shift_sigma).toFixed(1)} σ` : "";
    const words = { learning: `learning (${whole(drift.n ?? 0)} frames)`, ok: "steady", drifting: "drifting" };
    const more = [isNumber(drift.spread) && `spread\u00a0×\u00a0${drift.spread.toFixed(2)}`, isNumber(drift.ks) && `KS\u00a0${drift.ks.toFixed(2)}`];
    setLines(part, [shift, words[drift.state] ?? drift.state].filter(Boolean).join(" "), more.filter(Boolean).join(" · "), drift.advice);
  }

  showNg() {
    const shots = this.live.ng;
    this.ngNone.hidden = shots.length > 0;
    const ids = shots.map((shot) => shot.id).join();
    if (ids === this.ngIds) return;
    this.ngIds = ids;
    const kept = new Map([...this.ngList.children].map((item) => [item.dataset.id, item]));
    this.ngList.replaceChildren(...shots.map((shot) => kept.get(shot.id) ?? this.ngItem(shot)));
  }

  ngItem(shot) {
    const item = byId("ng-template").content.firstElementChild.cloneNode(true);
    item.dataset.id = shot.id;
    const title = `NG at ${clock(shot.utc)}, camera ${this.name}, score ${scoreText(shot.score)}`;
    const picture = item.querySelector("img");
    picture.src = `ng/${encodeURIComponent(shot.id)}.jpg`;
    picture.alt = title;
    setText(item.querySelector(".when"), clock(shot.utc));
    setText(item.querySelector(".value"), scoreText(shot.score));
    item.querySelector("button").addEventListener("click", () => {
      byId("zoom-picture").src = picture.src;
      byId("zoom-picture").alt = title;
      setText(byId("zoom-caption"), title);
      byId("zoom").showModal();
    });
    return item;
  }

  // ---- the chart ----

  point(x) {
    this.pointed = x;
    this.drawChart();
  }

  drawChart() {
    const { canvas, points, live } = this;
    const limits = [["fail", live?.fail, "--ng", []], ["warn", live?.warn, "--warn", [6, 4]]].filter(([, value]) => isNumber(value));
    this.describeChart(limits);
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (!width || !height) return;
    const scale = window.devicePixelRatio || 1;
    const [across, down] = [Math.round(width * scale), Math.round(height * scale)];
    if (canvas.width !== across || canvas.height !== down) [canvas.width, canvas.height] = [across, down];
    const pen = canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.font = LABEL;
    const labels = limits.map(([name, value]) => pen.measureText(`${name} ${levelText(value)}`).width);
    const box = { left: 50, right: width - 16 - Math.max(0, ...labels), top: 10, bottom: height - 22 };
    const x = this.timeScale(box);
    const y = this.scoreScale(box, limits);
    if (!x || !y) {
      pen.fillStyle = colour("--soft");
      pen.textAlign = "center";
      pen.fillText("No scores yet", width / 2, height / 2);
      return;
    }
    drawAxes(pen, box, x, y);
    drawLimits(pen, box, y, limits);
    drawCurve(pen, points, x, y, this.gap());
    drawMarks(pen, box, points, x, y);
    this.drawPointed(pen, box, x, y);
  }

  timeScale(box) {
    const { points } = this;
    if (!points.length || !this.asked) return null;
    const now = this.nowS + secondsSince(this.asked);
    const [start, last] = [points[0][1], points.at(-1)[1]];
    // A camera that is silent for hours must not press its curve against the left edge.
    const end = Math.max(last, Math.min(now, last + 2 + 0.2 * (last - start)), start + 1);
    const to = (seconds) => box.left + ((seconds - start) / (end - start)) * (box.right - box.left);
    return Object.assign(to, { span: end - start, behind: Math.max(0, now - end) });
  }

  scoreScale(box, limits) {
    const scores = this.points.map((point) => point[2]).filter(isNumber);
    const values = [...scores, ...limits.map(([, value]) => value)];
    if (!scores.length) return null;
    let [low, high] = [Math.min(...values), Math.max(...values)];
    // One part far above the limit must not flatten all the others; it is drawn at the edge, as an arrow.
    const fail = limits.find(([name]) => name === "fail")?.[1];
    // Where most of them are, there is room for all of them.
    const usual = scores.sort((a, b) => a - b)[Math.floor(0.9 * (scores.length - 1))];
    if (isNumber(fail) && fail > low) high = Math.min(high, Math.max(fail + 1.5 * (fail - low), usual + 0.5 * (usual - low)));
    if (high <= low) [low, high] = [low - 0.5, high + 0.5];
    const room = 0.08 * (high - low);
    [low, high] = [low < 0 || low > room ? low - room : 0, high + room];
    const to = (score) => box.bottom - ((Math.min(score, high) - low) / (high - low)) * (box.bottom - box.top);
    return Object.assign(to, { low, high });
  }

  describeChart(limits) {
    const { points } = this;
    const counts = ["NG", "WARN", "INVALID"].map((verdict) => [verdict, points.filter((point) => point[3] === verdict).length]);
    const found = counts.filter(([, count]) => count).map(([verdict, count]) => `${count} ${verdict}`).join(", ") || (points.length ? "all OK" : "");
    const span = points.length > 1 ? ` in ${duration(points.at(-1)[1] - points[0][1])}` : "";
    const text = points.length ? `Last ${points.length} frame${points.length > 1 ? "s" : ""}${span}: ${found}` : "";
    const pointed = this.nearest();
    setText(this.summary, pointed ? this.pointText(pointed) : text);
    const levels = limits.map(([name, value]) => `${name} limit ${levelText(value)}`).join(", ");
    this.canvas.setAttribute("aria-label", `Scores of camera ${this.name}. ${text || "No scores yet"}. ${levels}`);
  }

  nearest() {
    const { points } = this;
    if (this.pointed === null || !points.length || !this.x) return null;
    return points.reduce((best, point) => (Math.abs(this.x(point[1]) - this.pointed) < Math.abs(this.x(best[1]) - this.pointed) ? point : best));
  }

  pointText([, seconds, score, verdict]) {
    return `${duration(this.nowS + secondsSince(this.asked) - seconds)} ago: ${verdict}${isNumber(score) ? `, score ${scoreText(score)}` : ""}`;
  }

  drawPointed(pen, box, x, y) {
    this.x = x;
    const pointed = this.nearest();
    if (!pointed) return;
    pen.strokeStyle = colour("--soft");
    pen.lineWidth = 1;
    pen.strokeRect(Math.round(x(pointed[1])) + 0.5, box.top, 0, box.bottom - box.top);
    if (isNumber(pointed[2])) dot(pen, x(pointed[1]), y(pointed[2]), 4, colour("--ink"));
  }
}

// ---- drawing ------------------------------------------------------------------------------------------------------

const LABEL = "600 12px system-ui, sans-serif";
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function dot(pen, x, y, radius, fill) {
  pen.fillStyle = fill;
  pen.beginPath();
  pen.arc(x, y, radius, 0, 2 * Math.PI);
  pen.fill();
}

function ticks(low, high) {
  const raw = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw);
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, index) => (first + index) * step);
}

function drawAxes(pen, box, x, y) {
  pen.font = "12px system-ui, sans-serif";
  pen.lineWidth = 1;
  pen.strokeStyle = colour("--line");
  pen.fillStyle = colour("--soft");
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  pen.setLineDash([]);
  for (const value of ticks(y.low, y.high)) {
    const at = Math.round(y(value)) + 0.5;
    pen.beginPath();
    pen.moveTo(box.left, at);
    pen.lineTo(box.right, at);
    pen.stroke();
    pen.fillText(levelText(value), box.left - 6, at);
  }
  pen.textBaseline = "alphabetic";
  const bottom = box.bottom + 16;
  pen.textAlign = "left";
  pen.fillText(`${duration(x.span + x.behind)} ago`, box.left, bottom);
  pen.textAlign = "right";
  pen.fillText(x.behind < 1.5 ? "now" : `${duration(x.behind)} ago`, box.right, bottom);
}

function drawLimits(pen, box, y, limits) {
  pen.textAlign = "left";
  pen.textBaseline = "middle";
  pen.font = LABEL;
  pen.lineWidth = 1.5;
  let above = -Infinity;
  for (const [name, value, tone, dash] of limits) {
    const at = Math.round(y(value)) + 0.5;
    pen.strokeStyle = pen.fillStyle = colour(tone);
    pen.setLineDash(dash);
    pen.beginPath();
    pen.moveTo(box.left, at);
    pen.lineTo(box.right, at);
    pen.stroke();
    // Limits that lie close together keep labels that can be read.
    above = Math.max(at, above + 14);
    pen.fillText(`${name} ${levelText(value)}`, box.right + 8, above);
  }
  pen.setLineDash([]);
}

function drawCurve(pen, points, x, y, gap) {
  pen.strokeStyle = colour("--curve");
  pen.lineWidth = 1.5;
  pen.lineJoin = "round";
  pen.beginPath();
  let before = null;
  for (const [, seconds, score] of points) {
    if (!isNumber(score)) {
      before = null;
      continue;
    }
    // A pause is a hole in the curve, not a straight line.
    const isJoined = before !== null && seconds - before < Math.max(1, 6 * gap);
    if (isJoined) pen.lineTo(x(seconds), y(score));
    else pen.moveTo(x(seconds), y(score));
    before = seconds;
  }
  pen.stroke();
  const last = points.at(-1);
  if (isNumber(last[2])) dot(pen, x(last[1]), y(last[2]), 3, colour("--curve"));
}

/** NG is a triangle, WARN a diamond, INVALID a cross on the axis: told apart without their colours too. */
function drawMarks(pen, box, points, x, y) {
  const tones = { NG: colour("--ng"), WARN: colour("--warn"), INVALID: colour("--invalid") };
  for (const [, seconds, score, verdict] of points) {
    const [at, tone] = [x(seconds), tones[verdict]];
    if (verdict === "INVALID") {
      pen.strokeStyle = tone;
      pen.lineWidth = 2;
      pen.beginPath();
      for (const side of [-1, 1]) {
        pen.moveTo(at - 3, box.bottom - 5 - 3 * side);
        pen.lineTo(at + 3, box.bottom - 5 + 3 * side);
      }
      pen.stroke();
    } else if (tone && isNumber(score)) {
      const [level, size] = [y(score), verdict === "NG" ? 5 : 4];
      const corners = verdict === "NG" ? [[0, -size], [size, size], [-size, size]] : [[0, -size], [size, 0], [0, size], [-size, 0]];
      pen.fillStyle = tone;
      pen.beginPath();
      for (const [dx, dy] of corners) pen.lineTo(at + dx, level + dy);
      pen.fill();
    }
  }
}

// ---- the connection -----------------------------------------------------------------------------------------------

const link = {
  answered: null, // when the last good answer was asked for
  started: mark(),
  problem: "",
  isLost() {
    return secondsSince(this.answered ?? this.started) > Math.max(LOST_S, (2.5 * pollMs) / 1000);
  },
};
let [run, number, pollMs, version, timer, isAsking] = ["", 0, 250, "", 0, false];
const cameras = new Map();
let newest = {};

function schedule(ms) {
  clearTimeout(timer);
  timer = setTimeout(poll, ms);
}

async function poll() {
  // In the background nobody looks: no load for the box, no traffic for the phone.
  if (isAsking || document.hidden) return;
  isAsking = true;
  const asked = mark();
  const abort = new AbortController();
  const limit = setTimeout(() => abort.abort(), ANSWER_MS);
  let wait = 1000;
  try {
    const answer = await fetch(`api/status?viewer=${viewer}&run=${run}&after=${number}`, { cache: "no-store", signal: abort.signal });
    if (!answer.ok) throw new Error(problemOf(answer.status));
    take(await answer.json(), asked);
    [link.answered, link.problem] = [asked, ""];
    wait = Math.max(0, pollMs - 1000 * secondsSince(asked));
  } catch (error) {
    link.problem = error instanceof TypeError || error.name === "AbortError" ? "" : error.message;
  } finally {
    clearTimeout(limit);
    isAsking = false;
    schedule(wait);
    tick();
  }
}

function problemOf(status) {
  if (status === 401) return "The box asks for its token again: load the page anew.";
  if (status === 503) return "Too many pages are open on this box: close one.";
  if (status === 429) return "Too many requests reach this box.";
  return `The box could not answer (${status}).`;
}

function take(answer, asked) {
  version ||= answer.page;
  if (version !== answer.page) return location.reload(); // the box was updated
  if (run !== answer.run) for (const camera of cameras.values()) camera.forget();
  [run, number, pollMs, newest] = [answer.run, answer.number, answer.poll_ms, answer];
  for (const status of answer.cameras) {
    const name = String(status.camera);
    if (!cameras.has(name)) cameras.set(name, new Camera(name));
    cameras.get(name).take(status, asked, answer.now_s);
  }
  for (const name of [...cameras.keys()]) if (!answer.cameras.some((status) => String(status.camera) === name)) cameras.delete(name);
  place();
  showSinks(answer.sinks ?? []);
}

function place() {
  const shown = [...cameras.values()];
  const main = byId("cameras");
  const isSame = main.children.length === shown.length && shown.every((camera, index) => main.children[index] === camera.root);
  if (!isSame) {
    shown.forEach((camera, index) => {
      camera.root.id = `camera-${index}`;
      camera.chip.href = `#camera-${index}`;
    });
    main.replaceChildren(...shown.map((camera) => camera.root));
    main.dataset.count = String(shown.length);
    byId("overview").replaceChildren(...shown.map((camera) => camera.chip));
  }
  byId("overview").hidden = shown.length < 2;
  byId("empty").hidden = shown.length > 0;
  setText(byId("empty"), "No camera yet.");
}

function showSinks(sinks) {
  byId("outputs").hidden = sinks.length === 0;
  const texts = sinks.map(({ sink, written, dropped, failing }) => ({
    isBad: Boolean(failing),
    text: `${sink}: ${failing ? "failing, " : ""}${whole(written ?? 0)} written, ${whole(dropped ?? 0)} dropped`,
  }));
  const key = JSON.stringify(texts);
  const list = byId("sinks");
  if (list.dataset.key === key) return;
  list.dataset.key = key;
  list.replaceChildren(
    ...texts.map(({ isBad, text }) => Object.assign(document.createElement("li"), { textContent: text, className: isBad ? "bad" : "" })),
  );
}

/** Runs on its own timer, so that a missing answer shows. */
function tick() {
  const isLost = link.isLost();
  const hasAnswered = link.answered !== null;
  byId("link").dataset.link = isLost ? "lost" : hasAnswered ? "live" : "connecting";
  const lostFor = hasAnswered ? ` for ${duration(secondsSince(link.answered))}` : "";
  setText(byId("link-text"), isLost ? `No connection${lostFor}` : hasAnswered ? "Connected" : "Connecting");
  const alarm = byId("alarm");
  // A text that stays the same: a screen reader says it once. The running time stands elsewhere.
  if (isLost) setText(alarm, link.problem || `No connection to the box.${hasAnswered ? " What you see is old." : ""}`);
  alarm.hidden = !isLost;
  for (const camera of cameras.values()) camera.age();
  const [name = "", digits = ""] = (newest.model ?? "").split("@");
  setText(byId("model"), name && `Model ${name}${digits ? ` (${digits.replace("sha256:", "").slice(0, 8)})` : ""}`);
  if (isNumber(newest.uptime_s) && hasAnswered) setText(byId("uptime"), isLost ? "" : `Running for ${duration(newest.uptime_s)}, since ${clock(newest.started_utc)}`);
  document.title = `${isLost ? "No connection" : titleOf()} – ${name || "edge-anomaly"}`;
}

function titleOf() {
  const verdicts = [...cameras.values()].map((camera) => (camera.isOld ? "unknown" : camera.live?.verdict));
  return ["NG", "INVALID", "WARN", "OK"].find((verdict) => verdicts.includes(verdict)) ?? "No verdict";
}

document.addEventListener("visibilitychange", () => {
  tick();
  if (!document.hidden) poll();
});
window.addEventListener("pageshow", () => poll());
setInterval(tick, 250);
poll();
