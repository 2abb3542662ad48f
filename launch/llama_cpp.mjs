// Continue a text in llama.cpp, greedily, with a context beyond the one that the model was trained on.
//
//     node launch/llama_cpp.mjs ENGINES MODEL.gguf TEXT NUM_PROMPT NUM_NEW OUTPUT.json
//
// ENGINES is the folder where npm installed node-llama-cpp. The prompt is the first NUM_PROMPT tokens of the file TEXT. Writes
// {prompt_tokens, prompt_end, text, book, context, seconds}; `book` is how the book goes on.
import {readFile, rename, writeFile} from "node:fs/promises";
import {resolve} from "node:path";
import {pathToFileURL} from "node:url";

const [engines, modelPath, textPath, numPrompt, numNew, output] = process.argv.slice(2);
const file = resolve(engines, "node_modules/node-llama-cpp/dist/index.js");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(file).href);

// Two threads: with its default a run hung for minutes on a loaded machine. Never build: only the prebuilt binary is used.
const llama = await getLlama({build: "never", gpu: false, maxThreads: 2, logLevel: LlamaLogLevel.error, skipDownload: true});
const model = await llama.loadModel({modelPath});
const tokens = [...model.tokenize(await readFile(textPath, "utf8"), false)];
const [length, count] = [Number(numPrompt), Number(numNew)];
const context = await model.createContext({contextSize: length + count, sequences: 1, threads: 2});
const sequence = context.getSequence();

const start = Date.now();
const made = [];
for await (const token of sequence.evaluate(tokens.slice(0, length), {temperature: 0})) {
    made.push(token);
    if (made.length >= count || model.isEogToken(token)) break;
}
const answer = {
    prompt_tokens: length,
    prompt_end: model.detokenize(tokens.slice(length - 60, length)),
    text: model.detokenize(made),
    book: model.detokenize(tokens.slice(length, length + count)),
    context: model.trainContextSize,
    seconds: (Date.now() - start) / 1000
};
// Renamed into place, since the demo takes an existing file for a finished stage.
await writeFile(output + ".partial", JSON.stringify(answer, null, 1) + "\n");
await rename(output + ".partial", output);
await context.dispose();
await model.dispose();
await llama.dispose();
