// What llama.cpp says, in node-llama-cpp: `node inside.mjs ENGINE JOBS ANSWERS`. Run by `check_gguf.py`.

import {readFileSync, writeFileSync} from "node:fs";
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const [engine, jobs, answers] = process.argv.slice(2);
const {getLlama} = await import(pathToFileURL(createRequire(engine + "/").resolve("node-llama-cpp")));
const llama = await getLlama({gpu: false, build: "never", skipDownload: true, maxThreads: 1});
// keys and values as transformers keeps them, in place of float16
const exact = {experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32", flashAttention: false};
// without these a probability is one among the likeliest alone
const greedy = {temperature: 0, topK: 0, topP: 1, minP: 0, yieldEogToken: true};

/** Makes tokens of a text, and continues them. */
async function answer(model, context, text, count) {
    const prompt = model.tokenize(text, true), tokens = [], log_probs = [];
    const sequence = context.getSequence();
    for await (const next of sequence.evaluateWithMetadata(prompt, {confidence: true}, greedy)) {
        tokens.push(next.token);
        log_probs.push(Math.log(next.confidence));
        if (tokens.length === count) break;
    }
    sequence.dispose();
    return {prompt, tokens, log_probs};
}

const found = [];
for (const job of JSON.parse(readFileSync(jobs, "utf8"))) {
    const model = await llama.loadModel({modelPath: job.file, gpuLayers: 0});
    const context = await model.createContext({contextSize: 256, threads: 1, ...exact});
    const said = [];
    for (const text of job.texts) said.push(await answer(model, context, text, job.new_tokens));
    const words = model.fileInfo.metadata.tokenizer;
    found.push({said, chat_template: words.chat_template, eos: words.ggml.eos_token_id});
    await context.dispose();
    await model.dispose();
}
writeFileSync(answers, JSON.stringify({release: llama.llamaCppRelease.release, found}));
