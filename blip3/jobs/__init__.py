# SPDX-License-Identifier: Apache-2.0
"""Jobs over many images on Ray Data, which a kill interrupts and the same command continues.

    inputs.plan_*  what is not done yet, cut into units --+
                                                          |
    ray_run.run    workers, each with a model of its own  +--> output.Output  a line for all that is done, in one
                   and with little in flight -------------+                   process, and a manifest that refuses
                                                                              to mix settings

There are two ways to cut the work:

    rows     `plan_rows` and a `batch_size`. Tasks read the units, workers get batches of rows and give each row its
             line, which the output keeps. `serving/batch.py` answers questions so.
    shards   `plan_shards`, no `batch_size`. One unit is one shard, and one worker reads it, works on it and writes
             its file whole or not at all (`files.writing`); the output keeps a line about the shard. Each worker has
             one shard in hand. A shard that was killed is done again. Work for a GPU can go to a few processes that
             all workers share (`pools`). `engines` are jobs of this kind.

Images lie in a folder, in parquet or in tars (`tars`). What is wrong with one image is an error of its row, in one
sentence (`inputs.one_sentence`), and never ends the run; an image that kills its worker is found by marks (`starts`).

An engine that measures the images of each parquet file of a folder:

    class Measure:
        def __init__(self, output: str):
            self.output = Path(output)  # here a real engine loads its model, once for each worker

        def __call__(self, shard: dict) -> dict:
            rows = [measure(row) for table in inputs.read_unit(shard, 64) for row in table.to_pylist()]
            with files.writing(self.output / shard["id"]) as unfinished:
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), unfinished)
            return {"id": shard["id"], "rows": len(rows), "errors": sum(row["error"] is not None for row in rows)}

    def measure(row: dict) -> dict:
        size, error = None, None
        try:
            size = Image.open(io.BytesIO(inputs.read_image(row["kind"], row["image"]))).size
        except (OSError, ValueError) as problem:
            error = inputs.one_sentence(problem)
        return {"id": row["id"], "size": size, "error": error}

    def is_there(line: dict) -> bool:
        return (folder / line["id"]).is_file()

    with output.Output(folder, "shards.jsonl", {"input": "shards"}, is_there=is_there) as out:
        plan = inputs.plan_shards(Path("shards"), out.done, inputs.Columns(image="photo"))
        print(ray_run.run(plan, out, Measure, (str(folder),), workers=4))

Everything here takes plain values and callables; nothing knows of models or of questions.
"""
