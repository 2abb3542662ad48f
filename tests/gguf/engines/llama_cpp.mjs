// Run GGUF files in llama.cpp, by the prebuilt npm package node-llama-cpp; one job a line in, one line of JSON out.
//
//     node llama_cpp.mjs FOLDER      FOLDER is where npm installed the package
//
// A job: {model, contextSize, cache: "F16" | "F32", tokens: [ids], prompt: [ids], count, texts: [text]}. Its answer:
// {probabilities: [[p of every id] for every token], greedy: [count ids], ids: [[ids of a text], ...], context}.
import {resolve} from "node:path";
import {createInterface} from "node:readline";
import {pathToFileURL} from "node:url";

const file = resolve(process.argv[2], "node_modules/node-llama-cpp/dist/index.js");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(file).href);

// One thread: with its default a run hung for minutes on a loaded machine. Never build: only the prebuilt binary is used.
const llama = await getLlama({build: "never", gpu: false, maxThreads: 1, logLevel: LlamaLogLevel.error, skipDownload: true});
// Temperature 1 leaves the distribution as the model gives it.
const options = {temperature: 1, topK: 0, topP: 1, minP: 0};

async function next(sequence, tokens) {
    const input = tokens.map((token) => [token, {generateNext: {probabilities: true, options}}]);
    const found = await sequence.controlledEvaluate(input);
    return found.map(({next}) => {
        const row = new Array(next.probabilities.size).fill(0);
        for (const [token, probability] of next.probabilities) row[token] = probability;
        return row;
    });
}

async function greedy(sequence, prompt, count) {
    await sequence.clearHistory();
    const ids = [];
    let ahead = prompt;
    while (ids.length < count) {
        // The prompt in one batch, every later token with the cache of those before it.
        if (ahead.length > 1) await sequence.evaluateWithoutGeneratingNewTokens(ahead.slice(0, -1));
        const [row] = await next(sequence, ahead.slice(-1));
        ids.push(row.indexOf(Math.max(...row)));
        ahead = ids.slice(-1);
    }
    return ids;
}

async function run(job) {
    const model = await llama.loadModel({modelPath: job.model});
    const answer = {context: model.trainContextSize, ids: (job.texts ?? []).map((text) => [...model.tokenize(text, true)])};
    if (job.tokens) {
        const context = await model.createContext({
            contextSize: job.contextSize,
            sequences: 1,
            threads: 1,
            // Flash attention rounds to F16 inside, whatever the cache.
            flashAttention: job.cache === "F32" ? false : "auto",
            experimentalKvCacheKeyType: job.cache,
            experimentalKvCacheValueType: job.cache
        });
        const sequence = context.getSequence();
        answer.probabilities = await next(sequence, job.tokens);
        answer.greedy = await greedy(sequence, job.prompt, job.count);
        await context.dispose();
    }
    await model.dispose();
    return answer;
}

for await (const line of createInterface({input: process.stdin})) {
    const answer = await run(JSON.parse(line)).catch((error) => ({error: String(error)}));
    process.stdout.write(JSON.stringify(answer) + "\n");
}
await llama.dispose();
