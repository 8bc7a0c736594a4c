"""How good is it on real questions: SQuAD, RULER's synthetic tasks and more, at equal rows.

    python examples/tasks.py --list
    python examples/tasks.py --squad dev-v1.1.json --tasks squad --n 100 --output runs/tasks
    python examples/tasks.py --tasks niah_single_2 vt --lengths 1024 4096 --methods full bm25 gists --output runs/tasks
    python examples/tasks.py --squad dev-v1.1.json --trained-on mine.jsonl --checkpoint runs/mine --methods gists \\
        --output runs/tasks

The context is compressed before the question is seen (bm25 alone looks at it), then the question is read and answered
greedily. Each method's answers go to answers-METHOD.jsonl.gz as they come, and the same command goes on where a killed
one was. In the end summary.json and summary.md tell all answers in the folder, of this command and of others before.

The methods of kvpress (kvzip, adakv, snapkv, compactor, expected_attention) want transformers below 5.3, so they live
in an environment of their own, without gistkern; give it the same model as a folder, and the same output:

    python -m venv build/kvpress
    build/kvpress/bin/pip install torch==2.13.0 transformers==5.2.0 kvpress==0.5.5 rich
    build/kvpress/bin/pip install --no-deps gensim konlpy
    build/kvpress/bin/python examples/tasks.py --model build/SmolLM2-135M-Instruct --methods kvzip snapkv \\
        --squad dev-v1.1.json --output runs/tasks
"""

from __future__ import annotations

from tasks.command import main

if __name__ == "__main__":
    main(__doc__)
