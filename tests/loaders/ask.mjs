// For every line of JSON, loads a GGUF model, with or without a GGUF LoRA, and answers jobs: {text} is tokenized,
// {ids, count} continued. Starting node and llama.cpp takes longer than that.
import {createInterface} from "node:readline";
import {getLlama} from "node-llama-cpp";

const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: 2});
for await (const line of createInterface({input: process.stdin})) {
    const {model: modelPath, lora, jobs} = JSON.parse(line);
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
    await model.dispose();
    console.log(`ANSWERS ${JSON.stringify(answers)}`);
}
process.exit(0);
