"""--cache-eval: the evaluation crops of a run, kept in its directory until it is complete."""

from __future__ import annotations

import functools
import shlex
import shutil
from collections import Counter

from base.errors import ResourceError
from base.process import say
from base.progress import Progress
from harness.pool import in_processes
from harness.rundir import nearest_existing
from loop import Run
from sources import crops
from sources.images import default_crop
from sources.index import Split
from train_utils import phase_of


def lacking(run: Run, split: Split) -> dict[int, float]:
    """Return {size: crop} of the run's evaluations for which `split`'s own directory has no crops."""
    root, found = split.crop_root, {}
    for size in sorted({run.scored_as(phase)[0] for phase in run.phases}):
        crop = run.eval_crop or default_crop(size, run.index.native_size)
        if not (root and crops.find(root, split, size, crop, run.index.exif)):
            found[size] = crop
    return found


def note(run: Run) -> str:
    """Return how to store the crops that a packed dataset lacks, or '' if it has them or is not packed."""
    sizes, packed = lacking(run, run.index.val), run.index.val.crop_root
    held_out = run.index.val.whole is run.index.train.whole  # pack_dataset.py stores those of val/
    if not packed or not sizes or run.crop_root or held_out:
        return ""
    listed = ",".join(map(str, sizes))
    crop = f" --eval-crop {run.eval_crop!r}" if run.eval_crop else ""
    packed = shlex.quote(packed)
    command = f"python pack_dataset.py --data-dir {packed} --out {packed} --eval-sizes {listed}{crop}"
    return f"note: scoring at {listed} px decodes images every time; to store the crops: {command}"


def planned(run: Run) -> list[list[crops.Crops]]:
    """Return the crops that the run keeps, written or not; not those that are stored with its data."""
    return [
        [crops.Crops(run.crop_root, split, size, crop, run.index.exif) for size, crop in sizes.items()]
        for split in (run.index.val, run.train_sample)
        if (sizes := lacking(run, split))
    ]


def check_disk(run: Run) -> None:
    """Print how much disk the crops will take. Raises ResourceError if there is less."""
    if not run.crop_root:
        return
    scored = [e for e in range(1, run.epochs + 1) if run.is_scored(e)]
    if not (sets := planned(run)):
        say("note: --cache-eval does nothing here: the packed data has the crops")
    elif max(Counter(run.scored_as(phase_of(run.phases, e))[0] for e in scored).values()) == 1:
        say("note: --cache-eval saves nothing here: no image is scored twice at the same size")
    if not (need := sum(crops.missing_bytes(sets).values())):
        return
    free = shutil.disk_usage(nearest_existing(run.save_dir)).free
    say(f"evaluation crops: {need / 1e9:,.2f} GB in {run.crop_root}, {free / 1e9:,.1f} GB free")
    if need > free:
        what = f"--cache-eval needs {need / 1e9:,.2f} GB in {run.save_dir}, which has {free / 1e9:,.2f} GB"
        raise ResourceError(what, "free some space, use another --save-dir, or leave --cache-eval out")


def fill(run: Run) -> None:
    """Write the missing crops, each rank its share; an interrupted run continues where it stopped."""
    if not run.crop_root:
        return
    run.runtime.barrier()  # rank 0 has locked the directory
    sets = planned(run)
    # Shared by their numbers, not by their places in the list: other ranks may be writing already.
    jobs = [job for job in crops.missing(sets) if sum(job) % run.runtime.world_size == run.runtime.rank]
    work = functools.partial(_write, sets, run.index.val, run.on_bad_image)
    with Progress(len(jobs), "evaluation crops", unit="shards", enabled=run.runtime.is_main) as progress:
        again = {"flag": "--num-workers", "again": "use --resume auto"}
        for _ in progress.over(in_processes(work, jobs, max(1, run.num_workers), **again)):
            pass
    run.runtime.barrier()


def _write(sets, val, on_bad_image: str, job: tuple[int, int]) -> None:
    crops.write(sets, job, "fail" if sets[job[0]][0].split is val else on_bad_image)


def delete(run: Run) -> None:
    """Delete the crops of a complete run: nothing will read them again."""
    if run.crop_root and run.runtime.is_main:
        shutil.rmtree(run.crop_root, ignore_errors=True)
