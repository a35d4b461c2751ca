import { VIDEO, AUDIO, CONTROL, pack, unpack, Sync, Playout, Recent } from "./live.js";

const $ = (id) => document.getElementById(id);
const state = { socket: null, wanted: false, tries: 0, source: "", sources: [], upload: null, level: { side: 512, fps: 30, jpeg_quality: 80, chunk_ms: 128 }, sequence: 0, sound: 0, received: 0, sentAt: 0, begun: 0 };
const before = $("before").getContext("2d"), after = $("after").getContext("2d"), camera = $("camera");
const sync = new Sync(), playout = new Playout(), latency = new Recent(), shownAt = new Recent(60);
const count = { shown: 0, sent: 0, unsent: 0, dropped: 0 };

// ---- what is said ------------------------------------------------------------------------------------------------------------------

function say(text = "") { $("message").textContent = text; $("message").hidden = !text; }

function become(name, status, told = "") {
  document.body.dataset.state = name;
  $("status").lastElementChild.textContent = status;
  if (told) $("told").textContent = told;
  $("stop").disabled = !state.wanted;
}

const CAMERA = {
  NotAllowedError: "The camera was refused. Allow it for this page in the browser's address bar, then start again.",
  NotFoundError: "No camera was found. Connect one, then start again.",
  NotReadableError: "Another program is using the camera. Close it, then start again.",
  OverconstrainedError: "The camera can't make a picture of this size.",
};

// ---- the camera --------------------------------------------------------------------------------------------------------------------

const RING = Array.from({ length: 24 }, () => { const canvas = document.createElement("canvas"); canvas.width = canvas.height = 512; return { canvas, draw: canvas.getContext("2d", { willReadFrequently: true }), sequence: -1 }; });

async function openCamera() {
  if (!navigator.mediaDevices) throw Object.assign(new Error(), { said: "Browsers give the camera only to https pages and to localhost. Start the server with --tls-cert and --tls-key." });
  const stream = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 960 }, height: { ideal: 720 }, frameRate: { ideal: 30 }, facingMode: "user" } });
  camera.srcObject = stream;
  stream.getVideoTracks()[0].onended = () => { if (state.wanted) stop("The camera went away."); };
  await camera.play();
  each(camera);
}

function each(video) {
  const next = (now, meta) => {
    if (camera.srcObject !== video.srcObject || !video.srcObject) return;
    capture(meta?.captureTime && Math.abs(performance.now() - meta.captureTime) < 1000 ? meta.captureTime : performance.now());
    ask();
  };
  const ask = () => video.requestVideoFrameCallback ? video.requestVideoFrameCallback(next) : setTimeout(() => next(), 33);
  ask();
}

async function capture(captureMs) {
  const socket = state.socket, now = performance.now(), { side, fps, jpeg_quality } = state.level;
  if (!socket || socket.readyState !== 1 || now - state.sentAt < 750 / fps) return;
  const onTheirWay = state.sequence - state.received;
  if (socket.bufferedAmount > 150_000 || (onTheirWay >= 4 && now - state.sentAt < 1000)) { count.unsent += 1; return; }
  if (onTheirWay >= 4) state.received = state.sequence - 1;
  state.sentAt = now;
  const sequence = ++state.sequence, slot = RING[sequence % RING.length], w = camera.videoWidth, h = camera.videoHeight, n = Math.min(w, h);
  if (!n) return;
  if (slot.canvas.width !== side) slot.canvas.width = slot.canvas.height = side;
  slot.sequence = sequence;
  slot.draw.setTransform(-1, 0, 0, 1, side, 0); // a mirror, as people expect; done here so that the mark reads the right way round
  slot.draw.drawImage(camera, (w - n) / 2, (h - n) / 2, n, n, 0, 0, side, side);
  const blob = await new Promise((done) => slot.canvas.toBlob(done, "image/jpeg", Math.min(.92, jpeg_quality / 100 + .05)));
  if (!blob || socket.readyState !== 1) return;
  socket.send(pack(VIDEO, sequence, captureMs * 1e3, await blob.arrayBuffer()));
  count.sent += 1;
}

// ---- the server --------------------------------------------------------------------------------------------------------------------

async function ticket() {
  const answer = await fetch("/ticket", { method: "POST" });
  const said = await answer.json().catch(() => ({}));
  if (!answer.ok) throw Object.assign(new Error(said.error || `the server answered ${answer.status}`), { refused: true });
  return said;
}

async function connect() {
  if (!state.wanted) return;
  become(state.begun ? "lost" : "connecting", state.begun ? "reconnecting" : "connecting");
  let socket, opened = false;
  try {
    const { ticket: mine, protocol } = await ticket();
    if (!state.wanted) return;
    socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/live`, [protocol, `ticket.${mine}`]);
  } catch (e) { return again(e.refused ? e.message : ""); }
  socket.binaryType = "arraybuffer";
  socket.onopen = () => {
    opened = true; state.socket = socket; state.tries = 0; state.sequence = state.received = 0; held.splice(0); say();
    RING.forEach((slot) => { slot.sequence = -1; });
    send({ type: "hello", acks: true, swap: $("swap").checked, ...voiceWish() });
    choose(state.source, true);
  };
  socket.onmessage = ({ data }) => take(unpack(data));
  socket.onclose = async ({ code, reason }) => {
    if (state.socket === socket) state.socket = null;
    if (!state.wanted) return;
    if (opened) return again(code === 1008 ? `The server ended the session: ${reason}.` : "");
    const alive = await fetch("/health").then((a) => a.ok, () => false);
    again(alive ? "The server refused the ticket. It may be full, or the page may be older than the server: load it again." : "");
  };
}

function again(why) {
  if (!state.wanted) return;
  if (why) say(why);
  const wait = Math.min(5, .4 * 2 ** state.tries++);
  become("lost", "reconnecting", why || "The server does not answer. Trying again …");
  setTimeout(connect, 1e3 * wait * (.8 + .4 * Math.random()));
}

function send(message) { if (state.socket?.readyState === 1) state.socket.send(pack(CONTROL, 0, 0, message)); }

function take({ kind, sequence, captureUs, payload }) {
  if (kind === VIDEO) return picture(sequence, captureUs, payload);
  if (kind === AUDIO) return play(captureUs, payload);
  if (payload.type === "welcome") welcome(payload);
  if (payload.type === "stats") numbers(payload);
  if (payload.type === "settings") state.level = payload.level;
  if (payload.type === "error") say(payload.message);
}

// ---- pictures that come back -------------------------------------------------------------------------------------------------------

const held = []; // waiting for their sound; without sound the newest is shown at once

async function picture(sequence, captureUs, jpeg) {
  state.received = Math.max(state.received, sequence);
  const bitmap = await createImageBitmap(new Blob([jpeg], { type: "image/jpeg" })).catch(() => null);
  if (!bitmap || !state.wanted) return bitmap?.close();
  held.push({ sequence, captureUs, bitmap });
  held.sort((a, b) => a.sequence - b.sequence);
  while (held.length > 12) leave(held.shift());
}

function leave({ bitmap, sequence }) { bitmap.close(); count.dropped += 1; send({ type: "shown", sequence }); }

function show() {
  requestAnimationFrame(show);
  const position = playout.positionUs();
  if (position == null) while (held.length > 1) leave(held.shift());
  while (held.length) {
    const verdict = sync.video(held[0].captureUs, position);
    if (verdict === "hold") return;
    const frame = held.shift();
    if (verdict !== "show") { leave(frame); continue; }
    paint(frame);
    return;
  }
}

function paint({ sequence, captureUs, bitmap }) {
  const slot = RING[sequence % RING.length], side = bitmap.width;
  for (const c of [before.canvas, after.canvas]) if (c.width !== side) c.width = c.height = side;
  if (slot.sequence === sequence) before.drawImage(slot.canvas, 0, 0, side, side);
  after.drawImage(bitmap, 0, 0);
  bitmap.close();
  if (document.body.dataset.state !== "live") become("live", "live");
  state.begun ||= performance.now();
  count.shown += 1;
  latency.add(performance.now() - captureUs / 1e3);
  shownAt.add(performance.now());
  send({ type: "shown", sequence });
}

// ---- sound -------------------------------------------------------------------------------------------------------------------------

let sound = null;

async function openSound() {
  const stream = await navigator.mediaDevices.getUserMedia({ audio: { echoCancellation: true, noiseSuppression: true, autoGainControl: true } });
  let context = new AudioContext({ sampleRate: 16000, latencyHint: "interactive" }), source;
  try { source = context.createMediaStreamSource(stream); } catch { await context.close(); context = new AudioContext({ latencyHint: "interactive" }); source = context.createMediaStreamSource(stream); }
  await context.audioWorklet.addModule("/sound.js");
  const catcher = new AudioWorkletNode(context, "catcher"), player = new AudioWorkletNode(context, "player", { numberOfInputs: 0, outputChannelCount: [1] });
  source.connect(catcher);
  player.connect(context.destination);
  let offset = performance.now() - context.currentTime * 1e3;
  catcher.port.onmessage = ({ data }) => {
    const fresh = performance.now() - context.currentTime * 1e3;
    if (Math.abs(fresh - offset) > 60) offset = fresh;
    const pcm = new Int16Array(512);
    for (let i = 0; i < 512; i++) pcm[i] = Math.max(-32768, Math.min(32767, data.sound[i] * 32768));
    if (state.socket?.readyState === 1 && state.socket.bufferedAmount < 150_000) state.socket.send(pack(AUDIO, state.sound++, (data.atMs + offset) * 1e3, pcm.buffer));
  };
  player.port.onmessage = ({ data }) => playout.heard(data.captureMs, data.leftMs);
  return { stream, context, player };
}

function play(captureUs, pcm) {
  if (!sound) return;
  const ints = new Int16Array(pcm), floats = new Float32Array(ints.length);
  for (let i = 0; i < ints.length; i++) floats[i] = ints[i] / 32768;
  sound.player.port.postMessage({ sound: floats, captureMs: captureUs / 1e3 });
}

function closeSound() {
  sound?.stream.getTracks().forEach((t) => t.stop());
  sound?.context.close();
  sound = null;
  playout.silent();
}

function voiceWish() { return { voice: $("hear").checked, pitch_semitones: +$("pitch").value, formant: +$("formant").value }; }

$("hear").onchange = async () => {
  document.querySelector(".sliders").hidden = !$("hear").checked;
  for (const id of ["voicehead", "voicenumbers"]) $(id).hidden = !$("hear").checked;
  closeSound();
  if ($("hear").checked) {
    try { sound = await openSound(); say(); }
    catch (e) { $("hear").checked = false; document.querySelector(".sliders").hidden = true; say(e.name === "NotAllowedError" ? "The microphone was refused. Allow it in the browser's address bar." : "No microphone was found."); }
  }
  send({ type: "settings", ...voiceWish() });
};
for (const [id, show] of [["pitch", (v) => (v > 0 ? "+" : v < 0 ? "−" : "") + Math.abs(v)], ["formant", (v) => (+v).toFixed(2)]]) {
  $(id).oninput = () => { $(id).nextElementSibling.textContent = show($(id).value); };
  $(id).onchange = () => send({ type: "settings", ...voiceWish() });
}

// ---- faces to lend -----------------------------------------------------------------------------------------------------------------

function welcome({ sources }) {
  if (state.sources.length) return;
  state.sources = sources;
  tiles();
}

function tiles() {
  const box = $("sources");
  box.replaceChildren();
  const faces = [...state.sources.map((s) => ({ ...s, picture: `/portrait/${s.id || "own"}` })), ...(state.upload ? [state.upload] : [])];
  for (const face of faces) {
    const button = document.createElement("button"), img = new Image();
    img.src = face.picture; img.alt = face.name;
    Object.assign(button, { title: face.name, onclick: () => choose(face.id) });
    button.setAttribute("role", "radio"); button.dataset.source = face.id;
    button.append(img);
    box.append(button);
  }
  const add = Object.assign(document.createElement("button"), { className: "add", textContent: "your picture", onclick: () => $("consent").checked ? $("file").click() : say("Tick the line below first, if it is true.") });
  box.append(add);
  mark();
}

function mark() {
  const face = [...state.sources, ...(state.upload ? [state.upload] : [])].find((s) => s.id === state.source) || state.sources[0];
  for (const b of $("sources").querySelectorAll("[role=radio]")) b.setAttribute("aria-checked", b.dataset.source === face?.id);
  $("credit").textContent = face ? `${face.name}, ${face.credit}` : "";
}

async function choose(id, anew = false) {
  state.source = id;
  mark();
  if (state.upload && id === state.upload.id && anew) return sendPicture(state.upload.file);
  if (id || !anew) send({ type: "source", source: id });
}

async function sendPicture(file) {
  try {
    const { ticket: mine } = await ticket();
    const answer = await fetch("/source", { method: "POST", body: file, headers: { Authorization: `Bearer ${mine}`, "X-Consent": $("consent").checked ? "yes" : "no", "Content-Type": file.type || "application/octet-stream" } });
    const said = await answer.json();
    if (!answer.ok) throw new Error(said.error);
    if (state.upload) URL.revokeObjectURL(state.upload.picture);
    state.upload = { id: said.source, name: "Your picture", credit: "kept in memory for half an hour", file, picture: URL.createObjectURL(file) };
    tiles();
    choose(said.source);
    say();
  } catch (e) { say(e.message === "Failed to fetch" ? "The picture could not be sent." : e.message); }
}

$("file").onchange = () => { const [file] = $("file").files; $("file").value = ""; if (file) sendPicture(file); };

// ---- numbers -----------------------------------------------------------------------------------------------------------------------

const past = []; // (left out, processed) of the last ten seconds
const STAGES = ["decode", "follow", "swap", "enhance", "mark", "encode"];

function numbers({ dropped, queues, level, work_ms, voice, processed, swap }) {
  state.level = level;
  const whole = (v) => Number.isFinite(v) ? Math.round(v) : "–", span = shownAt.values;
  $("latency").textContent = whole(latency.at(.5));
  $("latency95").textContent = whole(latency.at(.95));
  $("fps").textContent = span.length > 2 && performance.now() - span.at(-1) < 2000 ? ((span.length - 1) / (span.at(-1) - span[0]) * 1e3).toFixed(1) : "0";
  past.push([Object.values(dropped).reduce((a, b) => a + b, 0) + count.dropped + count.unsent, processed]);
  if (past.length > 10 || processed < past[0][1]) past.splice(0, processed < past[0][1] ? past.length - 1 : 1);
  const lost = past.at(-1)[0] - past[0][0], all = past.at(-1)[1] - past[0][1] + lost;
  $("drops").textContent = all > 0 ? `${(100 * Math.max(0, lost) / all).toFixed(1)} %` : "–";
  $("drops").title = Object.entries({ ...dropped, "on the page": count.dropped, "not sent": count.unsent }).map(([k, v]) => `${k} ${v}`).join(", ");
  $("quality").textContent = `${level.side} px · JPEG ${level.jpeg_quality} · ${Math.round(level.fps)} a second`;
  $("queues").textContent = `video ${queues.video} · sound ${queues.audio} · out ${queues.outbound}`;
  const stages = STAGES.filter((s) => swap && work_ms[s] >= .05), sum = stages.reduce((n, s) => n + work_ms[s], 0);
  $("work").replaceChildren(...stages.map((s) => { const i = document.createElement("i"); i.style.background = `var(--c${STAGES.indexOf(s)})`; i.style.flexGrow = work_ms[s] / sum; return i; }));
  $("legend").replaceChildren(...(stages.length ? stages : ["off"]).map((s) => { const span = document.createElement("span"), i = document.createElement("i"); i.style.background = `var(--c${STAGES.indexOf(s)})`; span.append(i, s === "off" ? "none: the swap is off" : `${s} ${work_ms[s].toFixed(1)} ms`); return span; }));
  if (voice.state) $("voicenumbers").textContent = `${voice.state}, ratio ${voice.ratio}, ${Math.round(voice.latency_ms)} ms late`;
  spark();
}

function spark() {
  const values = latency.values, top = Math.max(80, ...values) * 1.15;
  if (values.length < 2) return;
  const points = values.map((v, i) => `${(240 * i / (values.length - 1)).toFixed(1)} ${(36 - 36 * v / top).toFixed(1)}`);
  $("spark").firstElementChild.setAttribute("d", `M-2 40L-2 ${points[0].split(" ")[1]}L${points.join("L")}L242 40Z`);
}

// ---- buttons -----------------------------------------------------------------------------------------------------------------------

$("start").onclick = async () => {
  say();
  $("told").textContent = "Waiting for the camera …";
  try { await openCamera(); }
  catch (e) { return become("refused", "no camera", e.said || CAMERA[e.name] || "The camera could not be opened."); }
  state.wanted = true; state.tries = 0; state.begun = 0;
  connect();
};

function stop(why = "Stopped. Nothing was kept.") {
  state.wanted = false;
  camera.srcObject?.getTracks().forEach((t) => t.stop());
  camera.srcObject = null;
  state.socket?.close(1000);
  held.splice(0).forEach(({ bitmap }) => bitmap.close());
  $("hear").checked = false; document.querySelector(".sliders").hidden = true;
  closeSound();
  become("idle", "stopped", why);
}

$("stop").onclick = () => stop();
$("swap").onchange = () => send({ type: "swap", on: $("swap").checked });
$("slider").oninput = () => $("views").style.setProperty("--at", `${$("slider").value}%`);
for (const button of document.querySelectorAll(".choice button")) button.onclick = () => {
  document.body.dataset.view = button.dataset.view;
  for (const b of document.querySelectorAll(".choice button")) b.setAttribute("aria-checked", b === button);
};

window.avlabLive = { count, latency, state, playout }; // for tests, and for whoever is curious
fetch("/faces").then((a) => a.json()).then((found) => { if (!state.sources.length) { state.sources = found; tiles(); } }, () => say("The server does not answer."));
requestAnimationFrame(show);
