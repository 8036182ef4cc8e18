"""The build backend that pyproject.toml names: `pip install .` says what to do instead."""


def build_wheel(*args, **options):
    raise SystemExit(
        "This program is started in its folder and is not installed: run make setup (or pip install -r "
        "requirements.txt), then python train.py --help"
    )


build_sdist = build_editable = build_wheel
