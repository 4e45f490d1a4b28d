"""Black boxes: whatever answers texts and shows nothing else. `boxes` says what one is; `openai` asks an
OpenAI-compatible endpoint (`settings`, `keys`, `http`, `pace`, `meter`, `cache` and `asking` under it, `ways` the forms
of its requests and `scores` what is made of the answers), `local` a backbone or expert of ours, `callables` a Python
function. `prompts` makes one of a prompt and a model. No torch here, and no key is ever kept.
"""
