// Two audio worklets: one catches the microphone at 16 kHz in pieces of 32 ms, one plays what comes back and says what is being heard.

const RATE = 16000;

class Catcher extends AudioWorkletProcessor {
  constructor() { super(); this.piece = new Float32Array(512); this.n = 0; this.carry = 0; this.sum = 0; this.count = 0; }
  process([input]) {
    const channel = input[0];
    if (!channel) return true;
    for (let i = 0; i < channel.length; i++) { // when the context has another rate: means over the samples that fall into each of ours
      this.sum += channel[i]; this.count += 1; this.carry += RATE / sampleRate;
      if (this.carry < 1) continue;
      this.carry -= 1;
      this.piece[this.n++] = this.sum / this.count; this.sum = this.count = 0;
      if (this.n === 512) { this.port.postMessage({ sound: this.piece.slice(), atMs: (currentTime + i / sampleRate) * 1e3 - 32 }); this.n = 0; }
    }
    return true;
  }
}

class Player extends AudioWorkletProcessor {
  constructor() {
    super();
    this.chunks = []; this.at = 0; this.playing = false; this.ticks = 0; this.gain = 0;
    this.port.onmessage = ({ data }) => { if (data === "silence") { this.chunks = []; this.playing = false; return; } this.chunks.push(data); while (this.left() > .45 * RATE) { this.chunks.shift(); this.at = 0; this.gain = 0; } };
  }
  left() { return this.chunks.reduce((n, c) => n + c.sound.length, 0) - this.at; }
  process(_, [output]) {
    const out = output[0], step = RATE / sampleRate;
    if (!this.playing && this.left() > .03 * RATE) this.playing = true;
    for (let i = 0; i < out.length; i++) {
      if (!this.playing || !this.chunks.length) { this.playing = false; this.gain = 0; out[i] = 0; continue; }
      const { sound } = this.chunks[0], k = Math.floor(this.at);
      this.gain = Math.min(1, this.gain + .004);
      out[i] = this.gain * (sound[k] + (this.at - k) * ((sound[k + 1] ?? sound[k]) - sound[k]));
      this.at += step;
      if (this.at >= sound.length) { this.at -= sound.length; this.chunks.shift(); }
    }
    if (this.playing && this.chunks.length && ++this.ticks % 2 === 0)
      this.port.postMessage({ captureMs: this.chunks[0].captureMs + this.at / RATE * 1e3, leftMs: this.left() / RATE * 1e3 });
    return true;
  }
}

registerProcessor("catcher", Catcher);
registerProcessor("player", Player);
