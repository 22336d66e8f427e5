"""Tokenize a corpus on many machines with Ray Data: ray_data.py STUDENT TEACHER DATA.jsonl OUT

OUT holds parquet files, which DistillTrainer reads from disk: load_rows(OUT) as train_dataset.
"""

import sys
from collections import Counter

import ray
from transformers import AutoTokenizer

import xtoken
from xtoken.data import ColumnExamples, load_rows

student, teacher, data, out = sys.argv[1:5]
ray.init(include_dashboard=False)  # on a cluster: ray.init(address="auto")
# Tokenizers, not their paths, which each worker would read with an import of torch.
pair = xtoken.Pair(*map(AutoTokenizer.from_pretrained, (student, teacher)))
rows = ray.data.read_json(data, lines=True).map_batches(
    pair.tokenize, fn_kwargs={"max_tokens": 512}, batch_size=512
)
rows.write_parquet(out)

examples = ColumnExamples(load_rows(out), pair.fingerprints)
print(f"{len(examples)} examples, {examples.cut} cut at 512 tokens")
for reason, count in Counter(each.reason for each in examples.left_out).most_common():
    print(f"{count} rows left out: {reason}")
