"""One sound call for each public name of the command and the tour;
the laws and the fuzz start from them"""

from dataclasses import replace

import torch

from foundation import command, tour
from foundation.core import tables
from foundation.data.images import ImageSet
from foundation.data.tasks import image_task
from foundation.recipes import account


def images(n):
    pixels = torch.randint(
        256, (n, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(n)
    )
    return pixels, torch.arange(n) % 2


def data():
    (train, y), (test, z) = images(40), images(20)
    return ImageSet(train, y, test, z, ("a", "b"), "tiny", "made up", 0.5, 0.25)


def row(name, runtime="PyTorch", accuracy=0.9, size=5000, latency=3.0):
    return dict(
        name=name,
        runtime=runtime,
        accuracy=accuracy,
        interval=[0.8, 0.95],
        bytes=size,
        latency_ms=latency,
        images_per_second=300.0,
        nonzero=100,
        macs=1000,
        parameters=100,
    )


def stages():
    return [
        row("teacher"),
        row("student", size=100, latency=0.5),
        row("student, int8", size=50, latency=0.49),
    ]


def metrics():
    return dict(
        pretrain=dict(knn_before=0.6, knn_after=0.7, knn_shipped=0.8),
        finetune=dict(pretrained=[0.79], scratch=[0.7]),
        distill=dict(student=[0.76], control=[0.7]),
        stages=stages(),
    )


TINY = replace(
    tour.SHORT,
    pretrain=1,
    looks=1,
    finetune=1,
    distil=1,
    teacher=1,
    student=1,
    recover=1,
    pictures=40,
    tests=20,
)
MINUTES, TYPE = "trains for seconds to minutes; its parts have examples of their own", "a record"

EXAMPLES = {
    "command.Finding": lambda: (
        command.Finding,
        dict(name="a", found="b", ok=True, remedy="", needed=False),
    ),
    "command.doctor": lambda: (
        command.doctor,
        dict(as_json=True, checks=[lambda: [command.Finding("a", "b")]]),
    ),
    "command.fetch_data": lambda: (command.fetch_data, dict(names=["digits"])),
    "tour.choose_plan": lambda: (tour.choose_plan, dict(short=True)),
    "tour.Plan": lambda: (
        tour.Plan,
        dict(pretrain=4, looks=2, labels=10, seeds=(0, 1), rates=(0.1,), tests=10, checked=False),
    ),
    "tour.fresh_encoder": lambda: (tour.fresh_encoder, dict(data=data())),
    "tour.shipped_encoder": lambda: (tour.shipped_encoder, {}),
    "tour.fresh_student": lambda: (tour.fresh_student, dict(data=data())),
    "tour.neighbours": lambda: (
        tour.neighbours,
        dict(encoder=tour.fresh_student(data()), data=data(), bank=30, tests=10),
    ),
    "tour.pixel_neighbours": lambda: (
        tour.pixel_neighbours,
        dict(data=data(), bank=30, tests=10),
    ),
    "tour.gentle": lambda: (tour.gentle, dict(data=data())),
    "tour.mirrored": lambda: (tour.mirrored, dict(data=data())),
    "tour.part_accuracy": lambda: (
        tour.part_accuracy,
        dict(model=tour.fresh_student(data()), task=image_task(data(), dev=2), part="test"),
    ),
    "tour.is_small": lambda: (
        tour.is_small,
        dict(gain=dict(times_smaller=30.0, times_faster=4.0, points_lost=1.0)),
    ),
    "core.tables.Table": lambda: (tables.Table, dict(heads=["a", "b"], rows=[["1", "2"]])),
    "recipes.account.account_table": lambda: (account.account_table, dict(stages=stages())),
    "recipes.account.gains": lambda: (account.gains, dict(stages=stages(), control="teacher")),
    "recipes.account.not_faster": lambda: (account.not_faster, dict(stages=stages())),
    "tour.check_claims": lambda: (tour.check_claims, dict(metrics=metrics())),
}
TRAINS = "trains a large network; tests/test_own_data.py tries it"
SKIP = {
    "command.CHECKS": "a constant",
    "command.check_software": "takes nothing",
    "command.check_hardware": "takes nothing",
    "command.check_data": "takes nothing, and hashes all data",
    "command.check_shipped": "hashes all weights",
    "command.check_extras": "takes nothing",
    "command.tour": MINUTES,
    "command.list_data": "takes nothing, and hashes all data",
    "command.list_weights": "takes nothing",
    "command.make_weights": "trains for hours",
    "command.finetune_own": TRAINS,
    "command.predict_own": "wants what finetune_own wrote; tests/test_own_data.py tries it",
    "own_data.LONGEST": "a constant",
    "own_data.Tuned": TYPE,
    "own_data.tune_pictures": TRAINS,
    "own_data.tune_texts": TRAINS,
    "own_data.tune": TRAINS,
    "own_data.load_tuned": "wants what tune wrote; tests/test_own_data.py tries it",
    "command.main": "the command line, which tests/test_command.py tries as it is typed",
    "tour.SHORT": "a constant",
    "tour.load_data": "reads all of Fashion-MNIST",
    "tour.Live": TYPE,
    "tour.Few": TYPE,
    "tour.pretrain_live": MINUTES,
    "tour.few_label_model": MINUTES,
    "tour.learn_from_few": MINUTES,
    "tour.linear_arm": MINUTES,
    "tour.student_alone": MINUTES,
    "recipes.tour_page.first_pictures": "draws a picture of real data",
    "recipes.tour_page.few_label_picture": "needs the records of a run",
    "recipes.tour_page.pretraining_pictures": "needs the records of a run",
    "recipes.tour_page.report": "needs the records of a run",
    "recipes.account.COLUMNS": "a constant",
    "recipes.account.network_forms": MINUTES,
    "recipes.account.account": MINUTES,
    "tour.learn_from_teacher": MINUTES,
    "tour.train_for_use": MINUTES,
    "tour.run": MINUTES,
    "tour.collect": "gathers the records of a run",
}
