// The live floor a second time: messages, and the rules of the clock. avlab.protocol and avlab.live are the originals; a test compares them.

export const VIDEO = 1, AUDIO = 2, CONTROL = 3, HEADER = 20;

/** One message: 20 bytes in front of a JPEG, PCM16 or a JSON object. */
export function pack(kind, sequence, captureUs, payload) {
  const body = kind === CONTROL ? new TextEncoder().encode(JSON.stringify(payload)) : new Uint8Array(payload);
  const message = new Uint8Array(HEADER + body.length), view = new DataView(message.buffer);
  message.set([0x41, 0x56, 1, kind]);
  view.setUint32(4, sequence >>> 0);
  view.setBigUint64(8, BigInt(Math.max(0, Math.round(captureUs))));
  view.setUint32(16, body.length);
  message.set(body, HEADER);
  return message;
}

export function unpack(buffer) {
  const view = new DataView(buffer);
  if (buffer.byteLength < HEADER || view.getUint16(0) !== 0x4156 || view.getUint8(2) !== 1 || view.getUint32(16) !== buffer.byteLength - HEADER) throw new Error("not an avlab message");
  const payload = buffer.slice(HEADER), kind = view.getUint8(3);
  return { kind, sequence: view.getUint32(4), captureUs: Number(view.getBigUint64(8)), payload: kind === CONTROL ? JSON.parse(new TextDecoder().decode(payload)) : payload };
}

/** When to show a picture. Times in µs on the capture clock; `clock` in seconds. */
export class Sync {
  constructor({ lateMs = 150, earlyMs = 10, driftMs = 45, window = 120, every = 8 } = {}) {
    Object.assign(this, { lateMs, earlyMs, driftMs, window, every, skipping: false, late: [], sinceSkip: 0 });
  }
  video(captureUs, positionUs) {
    if (positionUs == null) return "show";
    const lateMs = (positionUs - captureUs) / 1e3;
    if (lateMs > this.lateMs) return "drop";
    if (lateMs < -this.earlyMs) return "hold";
    this.late.push(lateMs);
    if (this.late.length > this.window) this.late.shift();
    this.decide();
    this.sinceSkip += 1;
    if (this.skipping && this.sinceSkip >= this.every) { this.sinceSkip = 0; return "skip"; }
    return "show";
  }
  decide() {
    const recent = this.skipping ? this.late.slice(-this.every) : this.late;
    if (!this.skipping && recent.length < this.window) return;
    const mean = recent.reduce((a, b) => a + b, 0) / recent.length;
    if (mean > this.driftMs) this.skipping = true;
    else if (this.skipping && mean < this.driftMs / 2) { this.skipping = false; this.late = []; }
  }
}

/** What is heard now, from what the loudspeaker's worklet reports: it never runs past what it was given. */
export class Playout {
  constructor(now = () => performance.now()) { this.now = now; this.last = null; this.report = null; }
  heard(captureMs, leftMs) { this.report = { captureMs, leftMs, at: this.now() }; }
  silent() { this.report = this.last = null; }
  positionUs() {
    if (!this.report) return null;
    const { captureMs, leftMs, at } = this.report;
    this.last = Math.max(this.last ?? -Infinity, captureMs + Math.min(this.now() - at, leftMs));
    return Math.round(this.last * 1e3);
  }
}

/** The middle and the edge of the last values. */
export class Recent {
  constructor(most = 120) { this.most = most; this.values = []; }
  add(v) { this.values.push(v); if (this.values.length > this.most) this.values.shift(); }
  at(q) { const s = [...this.values].sort((a, b) => a - b); return s.length ? s[Math.min(s.length - 1, Math.floor(q * s.length))] : NaN; }
}
