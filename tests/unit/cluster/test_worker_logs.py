"""The ends of the logs that Ray's workers leave on a node, by the files that Ray writes."""

from __future__ import annotations

from pathlib import Path

from dpo_ray.cluster.worker_logs import END_BYTES, ends_of_logs

JOB = "02000000"


def test_only_what_workers_of_the_job_have_printed_is_kept(tmp_path: Path) -> None:
    files = {
        f"worker-aa-{JOB}-11.err": f":job_id:{JOB}\n:actor_name:Engine\n" + "x" * END_BYTES + "\nthe last line\n",
        f"worker-bb-{JOB}-12.out": f":job_id:{JOB}\n:task_name:tokenize\n",  # Ray's own marks alone
        f"worker-cc-{JOB}-13.out": "",
        "worker-dd-ffffffff-14.out": f":job_id:{JOB}\nstarted in advance\n",
        "worker-ee-ffffffff-15.out": ":job_id:03000000\nof another job\n",
        "worker-ff-01000000-16.out": "of an earlier job\n",
        "raylet.out": "the raylet's words\n",
        "raylet.err": "",
        "gcs_server.out": "not of this node's workers\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    ends = dict(ends_of_logs(tmp_path, JOB))
    assert ends.keys() == {"Engine-11.err", "tasks-14.out", "raylet.out"}
    assert ends["Engine-11.err"].endswith(b"the last line\n")
    assert len(ends["Engine-11.err"]) == END_BYTES
