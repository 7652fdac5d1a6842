// Loads a GGUF model, with or without a GGUF LoRA, and answers jobs: {text} is tokenized, {ids, count} continued.
import {getLlama} from "node-llama-cpp";

const {model: modelPath, lora, jobs} = JSON.parse(process.argv[2]);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: 2});
const model = await llama.loadModel({modelPath, gpuLayers: 0});
const answers = [];
for (const job of jobs) {
    if (job.text !== undefined) {
        answers.push({ids: [...model.tokenize(job.text, true)]});
        continue;
    }
    const context = await model.createContext({
        contextSize: 512, ...(lora === null ? {} : {lora: {adapters: [{filePath: lora, scale: 1}]}})
    });
    const ids = [];
    for await (const token of context.getSequence().evaluate(job.ids, {temperature: 0})) {
        if (model.isEogToken(token)) break;
        ids.push(token);
        if (ids.length >= job.count) break;
    }
    answers.push({ids});
    await context.dispose();
}
console.log(JSON.stringify(answers));
process.exit(0);
