"""Models at work: vLLM and transformers engines that sample, the yes/no model that judges. Only for job bodies."""
