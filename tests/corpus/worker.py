"""One process of the test that kills one: compresses its share slowly and notes every batch that it begins.

python worker.py OUT NOTES RANK RANKS
"""

import sys
import time

from corpus_cases import documents, patched

from gistkern import compress_corpus
from gistkern.corpus import compress as compressing

out, notes, rank, ranks = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
compress = compressing.compress_documents


def noted(model, batch, **segments):
    with open(notes, "a") as file:
        file.write(f"{[len(ids) for ids in batch]} {sum(map(sum, batch))}\n")
    time.sleep(0.03)
    return compress(model, batch, **segments)


compressing.compress_documents = noted
options = {"batch_tokens": 1500, "chunk_documents": 128, "progress": False}
compress_corpus(patched().model, documents(2000), out, rank=rank, ranks=ranks, **options)
