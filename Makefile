# The commands of CONTRIBUTING.md, which CI runs too. `bash .ci/run` does all of it in a fresh environment.
.PHONY: test lint docs api pictures

test: # the default suite
	pytest -n auto

lint: # style, types, and which module may import which
	ruff check .
	ruff format --check .
	mypy
	lint-imports

docs: # the site, into outputs/site
	mkdocs build --strict

api: # tests/api.txt, after a public name or argument was changed on purpose
	python docs/.build/api.py

pictures: # of the playground, into docs/images; needs chromium and chromium-driver
	pytest -m slow tests/test_browser.py -k pictures_of_the_readme
	cp screenshots/playground-wide-light.png docs/images/playground-light.png
	cp screenshots/playground-wide-dark.png docs/images/playground-dark.png
