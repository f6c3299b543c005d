.PHONY: check test lanes slow docs results card

check:  # the code's form
	ruff check .
	ruff format --check .

test:  # the unit lane
	pytest -n 2

lanes:  # whole commands, documents and processes
	pytest -n 2 --dist loadfile -m "e2e or process"

slow:  # minutes, or packages of their own
	pytest -m slow

docs:  # the documentation, in build/site
	mkdocs build --strict

results:  # experiments that are missing or whose config changed
	python -m experiments

card:  # the documents' tables and figures, from results/
	python -m experiments.tables
	python -m experiments.figures
