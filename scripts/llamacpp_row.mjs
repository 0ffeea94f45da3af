// llama.cpp's plain decoding of a GGUF file, to be set beside `dvi bench step` of the same file. Greedy, batch 1, on
// the CPU; end tokens are written down like any other, so that every answer has its whole length. Prints a line a
// repetition and one JSON line last.
//
//     npm install node-llama-cpp            # anywhere above or beside: prebuilt llama.cpp, no compiler
//     node scripts/llamacpp_row.mjs MODEL.gguf [threads=2] [tokens=128] [repetitions=3] [prompt="..."]

import {createRequire} from "node:module";
import {availableParallelism, cpus} from "node:os";
import {join} from "node:path";
import {pathToFileURL} from "node:url";

const CHAT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n";

async function llamaCpp() {
    try {  // of the folder that it is called from, as npm installs it
        const path = createRequire(join(process.cwd(), "package.json")).resolve("node-llama-cpp");
        return {...(await import(pathToFileURL(path))), path};
    } catch (error) {
        if (error.code !== "MODULE_NOT_FOUND") throw error;
        console.error("node-llama-cpp is not installed here; npm install node-llama-cpp, in this folder or one above");
        process.exit(2);
    }
}

const median = (values) => [...values].sort((a, b) => a - b)[values.length >> 1];

const [modelPath, ...given] = process.argv.slice(2);
if (!modelPath) {
    console.error("give the path of a GGUF file: node scripts/llamacpp_row.mjs MODEL.gguf [threads=2] ...");
    process.exit(2);
}
const options = {threads: 2, tokens: 128, repetitions: 3, prompt: CHAT};
for (const pair of given) {
    const [name, ...rest] = pair.split("=");
    if (!(name in options) || !rest.length) {
        console.error(`options are ${Object.keys(options).map((o) => `${o}=...`).join(" ")}, got ${pair}`);
        process.exit(2);
    }
    options[name] = name === "prompt" ? rest.join("=") : Number(rest.join("="));
}
const {threads, tokens, repetitions, prompt} = options;

const {getLlama, LlamaLogLevel} = await llamaCpp();
const llama = await getLlama({gpu: false, build: "never", maxThreads: threads, logLevel: LlamaLogLevel.error});
const loadStart = performance.now();
const model = await llama.loadModel({modelPath});
const context = await model.createContext({contextSize: 1024, threads, sequences: 1});
const loadSeconds = (performance.now() - loadStart) / 1e3;
const sequence = context.getSequence();
const promptIds = model.tokenize(prompt, true);

async function decode() {
    await sequence.clearHistory();
    const ids = [], start = performance.now();
    let first = start;
    for await (const id of sequence.evaluate(promptIds, {temperature: 0, yieldEogToken: true})) {
        if (!ids.length) first = performance.now();
        ids.push(id);
        if (ids.length === tokens) break;
    }
    const end = performance.now();
    return {ids, generation: (ids.length - 1) / (end - first) * 1e3, withPrompt: ids.length / (end - start) * 1e3};
}

await decode();  // the warm-up
const runs = [];
for (let index = 0; index < repetitions; index++) {
    runs.push(await decode());
    const {generation, withPrompt} = runs.at(-1);
    console.log(`${generation.toFixed(1)} tokens/s after the first token, ${withPrompt.toFixed(1)} prompt included`);
}
console.log(model.detokenize(runs[0].ids.slice(0, 24)));
console.log(JSON.stringify({
    command: "llamacpp_row", release: llama.llamaCppRelease.release, cpu: cpus()[0].model, cores: availableParallelism(),
    system: llama.systemInfo.trim(), threads, tokens: runs.map((run) => run.ids.length), prompt_tokens: promptIds.length,
    load_s: loadSeconds, tokens_per_s: median(runs.map((run) => run.generation)),
    tokens_per_s_with_prompt: median(runs.map((run) => run.withPrompt)),
    token_ids: runs[0].ids, resident_bytes: process.memoryUsage().rss,
}));
process.exit(0);
