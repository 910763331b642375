// Runs one job with LiteRT.js, by the contract of edgefuse_devices/plan.py: reads job/plan.txt, job/feed.bin and the model, leaves
// job/answers.bin, and returns what a runner says. Nothing of the runtime is loaded before `measure` is called.

const NS_PER_MS = 1e6;
const VARIANTS = {
  litert_wasm_internal: "relaxed SIMD",
  litert_wasm_compat_internal: "SIMD",
  litert_wasm_threaded_internal: "relaxed SIMD and threads",
};
const TICKS = 200; // of the clock, to see how fine it is

let loaded; // the runtime, the plan and the model's bytes, for `again`

/** The whole job but the second loading. */
export async function measure() {
  const plan = readPlan(await (await got("job/plan.txt")).text());
  const bytes = new Uint8Array(await (await got(`job/${plan.model}`)).arrayBuffer());
  const feed = readFeed(plan, new Float32Array(await (await got("job/feed.bin")).arrayBuffer()));
  const [runtime, runtimeNs] = await timed(() => runtimeFor(plan.threads));
  loaded = { runtime, plan, bytes };
  const [model, coldNs] = await timed(() => compiled());
  const run = await runFeed(runtime, model, plan, feed);
  const numThreads = model.options.cpuOptions.numThreads;
  model.delete();
  await fetch("job/answers.bin", { method: "POST", body: run.answers });
  return {
    schema: 1,
    runtime: `LiteRT.js ${(await (await got("npm/@litertjs/core/package.json")).json()).version}`,
    cold_load_ns: coldNs,
    first_ns: run.first,
    warm_up_calls: run.warmUpCalls,
    latency_ns: run.latencies,
    capped: run.capped,
    unsteady: run.unsteady,
    kernels: `wasm with ${VARIANTS[variant()]}`,
    threads: numThreads,
    runtime_load_ms: (runtimeNs / NS_PER_MS).toFixed(1),
    clock_resolution_us: resolutionUs(),
  };
}

/** How long it takes to load the model once more, in nanoseconds. */
export async function again() {
  const [model, ns] = await timed(() => compiled());
  model.delete();
  return ns;
}

async function got(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(`${path} could not be read: ${answer.status}`);
  return answer;
}

async function timed(work) {
  const start = performance.now();
  const made = await work();
  return [made, Math.round((performance.now() - start) * NS_PER_MS)];
}

async function runtimeFor(threads) {
  if (!crossOriginIsolated) throw new Error("the page is not isolated: its clock is coarse, and it may have no threads");
  const cores = navigator.hardwareConcurrency; // LiteRT.js starts as many workers, and would wait for ever for one more
  if (threads > cores) throw new Error(`${threads} threads were asked for, and the browser has ${cores}`);
  const runtime = await import("@litertjs/core");
  await runtime.loadLiteRt("npm/@litertjs/core/wasm/", { threads: threads > 1 });
  const used = variant();
  if (!(used in VARIANTS) || (threads > 1) !== used.includes("threaded"))
    throw new Error(`wasm with ${threads} threads was asked for, and LiteRT.js loaded ${used}`);
  return runtime;
}

/** The variant of the runtime that the page has loaded. */
function variant() {
  const names = performance.getEntriesByType("resource").map((entry) => entry.name.split("/").at(-1));
  return names.find((name) => name.endsWith(".wasm"))?.replace(".wasm", "") ?? "none";
}

async function compiled() {
  const { runtime, plan, bytes } = loaded;
  const model = await runtime.loadAndCompile(bytes, { accelerator: "wasm", cpuOptions: { numThreads: plan.threads } });
  if (model.options.accelerator !== "wasm") throw new Error(`wasm was asked for, and LiteRT.js took ${model.options.accelerator}`);
  if (!(plan.entry in model.signatures)) throw new Error(`the model has no signature ${plan.entry}`);
  return model;
}

/** Warm up, then go round the feed until it is enough. */
async function runFeed(runtime, model, plan, feed) {
  const turn = new Turn(runtime, model, plan, feed);
  const warm = { start: performance.now(), calls: 0, first: null };
  while (warm.calls < plan.warmUp[0] || since(warm.start) < plan.warmUp[1]) {
    const ns = await turn.call();
    warm.first ??= ns;
    warm.calls += 1;
  }
  turn.rewind();
  const [few, duration, most, longest] = plan.measure;
  const latencies = [];
  const answers = [];
  let unsteady = 0;
  let capped = false;
  const start = performance.now();
  while (latencies.length < few || since(start) < duration) {
    capped = latencies.length >= plan.calls && (latencies.length >= most || (longest > 0 && since(start) >= longest));
    if (capped) break;
    const number = latencies.length % plan.calls;
    latencies.push(await turn.call());
    const answer = turn.answer();
    if (answers.length < plan.calls) answers.push(answer);
    else if (!same(answers[number], answer)) unsteady += 1;
  }
  turn.rewind();
  return { first: warm.first, warmUpCalls: warm.calls, latencies, capped, unsteady, answers: new Blob(answers) };
}

/** Goes round the feed call by call, and gives each cache back to the call after. */
class Turn {
  constructor(runtime, model, plan, feed) {
    Object.assign(this, { runtime, model, plan, feed, number: 0, outputs: {}, start: 0 });
    this.shapes = new Map(model.signatures[plan.entry].getInputDetails().map((each) => [each.name, each.shape]));
  }

  /** Begin again at call 0. */
  rewind() {
    drop(this.outputs);
    this.outputs = {};
    this.number = 0;
  }

  /** The next call; returns its nanoseconds. */
  async call() {
    const given = this.feed[this.number % this.plan.calls];
    const inputs = {};
    for (const { name, becomes } of this.plan.inputs) {
      inputs[name] = given.has(name)
        ? new this.runtime.Tensor(given.get(name), this.shapes.get(name))
        : this.outputs[becomes];
    }
    await this.itsTime();
    const [outputs, ns] = await timed(() => this.model.run(this.plan.entry, inputs));
    drop(this.outputs);
    drop(inputs);
    this.outputs = outputs;
    this.number += 1;
    return ns;
  }

  /** What the last call answered, as a copy. */
  answer() {
    return this.outputs[this.plan.outputs[0]].toTypedArray();
  }

  async itsTime() {
    if (this.plan.paceMs === 0) return;
    if (this.number === 0) this.start = performance.now();
    const wait = this.start + this.number * this.plan.paceMs - performance.now();
    if (wait > 0) await new Promise((go) => setTimeout(go, wait));
  }
}

function drop(tensors) {
  for (const tensor of Object.values(tensors)) tensor.delete(); // LiteRT.js lets a tensor be deleted twice
}

/** Nanoseconds. */
function since(start) {
  return (performance.now() - start) * NS_PER_MS;
}

/** Whether two answers are the same, bit for bit. */
function same(one, other) {
  const [a, b] = [one, other].map((each) => new Uint32Array(each.buffer, each.byteOffset, each.length));
  return a.length === b.length && a.every((bits, at) => bits === b[at]);
}

function readPlan(text) {
  const facts = {};
  for (const line of text.trim().split("\n")) {
    const [name, ...rest] = line.split(" ");
    (facts[name] ??= []).push(rest);
  }
  return {
    model: facts.model[0][0],
    entry: facts.entry[0][0],
    inputs: facts.input.map(([name, floats, , becomes]) => ({ name, floats: Number(floats), becomes })),
    outputs: facts.output.map(([name]) => name),
    calls: Number(facts.calls[0][0]),
    begins: new Set(facts.begins[0].map(Number)),
    warmUp: facts.warm_up[0].map(Number),
    measure: facts.measure[0].map(Number),
    threads: Number(facts.threads[0][0]),
    paceMs: Number(facts.pace_ns[0][0]) / NS_PER_MS,
  };
}

/** Of each call the inputs that it is given, by name. */
function readFeed(plan, floats) {
  const calls = [];
  let start = 0;
  for (let number = 0; number < plan.calls; number += 1) {
    const given = new Map();
    for (const input of plan.inputs) {
      if (input.becomes !== undefined && !plan.begins.has(number)) continue;
      given.set(input.name, floats.subarray(start, (start += input.floats)));
    }
    calls.push(given);
  }
  return calls;
}

/** The smallest step that the clock was seen to take, in microseconds. */
function resolutionUs() {
  let smallest = Infinity;
  for (let seen = 0, last = performance.now(); seen < TICKS; ) {
    const now = performance.now();
    if (now === last) continue;
    smallest = Math.min(smallest, now - last);
    [seen, last] = [seen + 1, now];
  }
  return Math.round(smallest * 1e4) / 10;
}
