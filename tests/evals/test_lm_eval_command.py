"""Run lm-eval through the evaluation command. The task files are local, so nothing is downloaded."""

import json

import pytest
from helpers import run_command

pytestmark = pytest.mark.slow


def write_tasks(folder):
    """Writes three local tasks, one for each kind of request."""
    records = [
        {"question": f"{n}+1=", "choices": [str(n + 1), "7", "x"], "gold": 0, "text": f"{n}+1={n + 1}."}
        for n in range(6)
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    source = f"dataset_path: json\ndataset_kwargs:\n  data_files: {folder / 'items.jsonl'}\ntest_split: train\n"
    choice = (
        'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: gold\n'
    )
    choice += "metric_list:\n  - metric: acc\n"
    rolling = 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
    rolling += "metric_list:\n  - metric: bits_per_byte\n"
    until = 'output_type: generate_until\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{choices[0]}}"\n'
    until += 'generation_kwargs:\n  until: ["."]\n  max_gen_toks: 4\nmetric_list:\n  - metric: exact_match\n'
    for name, text in (("local_choice", choice), ("local_rolling", rolling), ("local_until", until)):
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{source}{text}")


def test_command_runs_local_tasks(reference, tmp_path):
    write_tasks(tmp_path)
    arguments = [f"--checkpoint={reference}", "--data=", f"--lm_eval_path={tmp_path}", f"--output={tmp_path / 'out'}"]
    done = run_command("rho1_jax.evaluate", *arguments, "--lm_eval=local_choice,local_rolling,local_until")
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"lm_eval/local_choice/acc", "lm_eval/local_until/exact_match"} <= results.keys()
    assert results["lm_eval/local_rolling/bits_per_byte"] > 0
    unknown = run_command("rho1_jax.evaluate", f"--checkpoint={reference}", "--data=", "--lm_eval=no_such_task")
    assert unknown.returncode == 2 and "lm-eval knows no task no_such_task" in unknown.stderr
