// Loads a folder with transformers.js, as a user does, and continues rows greedily: a job comes in, an answer goes out.
import { readFileSync } from 'node:fs';
import { env, AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, Tensor } from '@huggingface/transformers';

env.allowRemoteModels = false;
env.localModelPath = '/';

const job = JSON.parse(readFileSync(0, 'utf8'));
const config = await AutoConfig.from_pretrained(job.folder);
const Model = config.is_encoder_decoder ? AutoModelForSeq2SeqLM : AutoModelForCausalLM;
const model = await Model.from_pretrained(job.folder, job.options.transformers_js ?? {});
const tokenizer = job.prompts ? await AutoTokenizer.from_pretrained(job.folder) : null;
if (tokenizer) tokenizer.padding_side = job.padding_side;

const whole = (rows) => new Tensor('int64', BigInt64Array.from(rows.flat(), BigInt), [rows.length, rows[0].length]);
const inputs = tokenizer
  ? await tokenizer(job.prompts, { padding: true })
  : { input_ids: whole(job.input_ids), attention_mask: whole(job.attention_mask) };
const made = await model.generate({
  input_ids: inputs.input_ids,
  attention_mask: inputs.attention_mask,
  max_new_tokens: job.max_new_tokens,
  do_sample: false,
});
const rows = (tensor) => tensor.tolist().map((row) => row.map(Number));
console.log(
  JSON.stringify({
    loaded_by: `transformers.js ${env.version}`,
    model: model.constructor.name,
    input_ids: rows(inputs.input_ids),
    sequences: rows(made),
  }),
);
