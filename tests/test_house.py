"Structure: notebooks and modules, README, order of imports, records, packaging"
import ast, importlib.util, json, os, re, shutil, subprocess, sys, zipfile
from configparser import ConfigParser
from pathlib import Path
import pytest
import deepfid

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT/'deepfid'

def _load_script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

keeper = _load_script(ROOT/'.ci/notebooks.py')
NOTEBOOKS = keeper.notebooks()
MODULES = sorted(PACKAGE.rglob('*.py'))
name_of = lambda p: p.relative_to(ROOT).as_posix()

def project_files():
    "Files of the project: all that git knows or would add; outside a clone (an sdist), all that is there"
    found = subprocess.run(['git', 'ls-files', '-z', '-co', '--exclude-standard'], cwd=ROOT, capture_output=True)
    if found.returncode == 0: return sorted({ROOT/n for n in found.stdout.decode().split('\0') if n and (ROOT/n).is_file()})
    made = {'.venv', 'out', 'build', 'dist', '__pycache__', '.pytest_cache', '.ipynb_checkpoints', '.git'}
    return sorted(p for p in ROOT.rglob('*') if p.is_file() and not made & set(p.parts) and '.egg-info' not in str(p))

@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
    "A copy of the project's files, in which tests may write"
    copy = tmp_path_factory.mktemp('checkout')
    for p in project_files():
        (copy/p.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(p, copy/p.relative_to(ROOT))
    return copy

def run(*args, cwd, **env):
    "Run a command; its error output is the message if it fails"
    done = subprocess.run([str(a) for a in args], cwd=cwd, capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, f'{args[0]}: {(done.stdout + done.stderr)[-3000:]}'
    return done.stdout

# -- notebooks and modules ------------------------------------------------------------------------------------------

def test_modules_equal_what_the_notebooks_export(checkout):
    work = checkout.parent/(checkout.name + '-export')
    shutil.copytree(checkout/'nbs', work/'nbs')
    shutil.copy(checkout/'pyproject.toml', work)
    for p in [*PACKAGE.rglob('__init__.py'), PACKAGE/'__main__.py', PACKAGE/'_nbdev.py']: # hand-written: the only modules without a notebook
        (work/p.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(p, work/p.relative_to(ROOT))
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} # nbdev exports nothing while it is set
    done = subprocess.run([Path(sys.executable).with_name('nbdev-export')], cwd=work, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    exported = {p.relative_to(work).as_posix(): p.read_bytes() for p in (work/'deepfid').rglob('*.py')}
    present = {name_of(p): p.read_bytes() for p in MODULES}
    assert sorted(exported) == sorted(present), 'a module without a notebook, or a notebook not exported: make export'
    stale = [n for n in present if present[n] != exported[n]]
    assert not stale, f'not what the notebooks export (make export): {stale}'

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_in_order(path):
    assert not keeper.problems(path)

def test_order_is_looked_after(tmp_path):
    "The check above notices each kind of disorder"
    good = dict(nbformat=4, nbformat_minor=5, metadata={}, cells=[
        dict(id='a', cell_type='markdown', metadata={}, source='# Title\n\n> Promise'),
        dict(id='b', cell_type='code', metadata={}, source='#| default_exp x', outputs=[], execution_count=None)])
    output = lambda **o: {'output_type': 'display_data', 'metadata': {}, **o}
    def found(change):
        nb = json.loads(json.dumps(good))
        change(nb, nb['cells'][1])
        keeper.write(tmp_path/'01_x.ipynb', nb)
        return ' '.join(keeper.problems(tmp_path/'01_x.ipynb'))
    assert not found(lambda nb, c: None)
    assert 'share an id' in found(lambda nb, c: c.update(id='a'))
    assert 'no valid id' in found(lambda nb, c: c.update(id='a b'))
    assert 'format 4.5' in found(lambda nb, c: nb.update(nbformat_minor=4))
    assert 'widget state' in found(lambda nb, c: nb['metadata'].update(widgets={}))
    assert 'execution count' in found(lambda nb, c: c.update(execution_count=3))
    assert 'promise' in found(lambda nb, c: nb['cells'][0].update(source='# Title'))
    assert 'default_exp' in found(lambda nb, c: c.update(source='y'))
    assert '101 characters' in found(lambda nb, c: c.update(source='x'*101))
    assert '13 lines of code stand before' in found(lambda nb, c: c.update(source=c['source'] + '\nx'*12))
    assert '31 lines' in found(lambda nb, c: c.update(source=c['source'] + '\nx'*30))
    assert 'widget view' in found(lambda nb, c: c.update(outputs=[output(data={keeper.WIDGET: {}})]))
    assert 'error' in found(lambda nb, c: c.update(outputs=[dict(output_type='error', ename='E', evalue='', traceback=[])]))
    assert 'progress bar' in found(lambda nb, c: c.update(outputs=[dict(output_type='stream', name='stdout', text='1\r2')]))
    assert 'not clean' in found(lambda nb, c: c.update(outputs=[dict(output_type='stream', name='stderr', text='warning')]))
    assert 'more than 400' in found(lambda nb, c: nb['cells'][0].update(source='# T\n\n> P\n' + 'x'*500_000))

def test_reading_path_is_the_same_everywhere(monkeypatch):
    "The list of .ci/notebooks.py, heads and feet of the stops, README and the site's sidebar"
    monkeypatch.syspath_prepend(str(ROOT/'.ci'))
    stops, readme = list(keeper.PATH), (ROOT/'README.md').read_text(encoding='utf-8')
    assert not [n for n in stops if not (ROOT/'nbs'/n).is_file()]
    table = re.findall(r'^\| \d+ \| \[(.+?)\]\(nbs/(.+?)\) \|.*\| (\d+) \|$', readme, re.M)
    assert [(n, title) for title, n, _ in table] == list(keeper.PATH.items())
    pages = _load_script(ROOT/'.ci/docs_site.py').sidebar([p for p in NOTEBOOKS if p.name != 'index.ipynb'])
    assert next(iter(pages.values())) == [f'nbs/{n}'.removesuffix('.ipynb') for n in stops]
    listed = [n for entries in pages.values() for n in entries]
    assert len(set(listed)) == len(listed) and len([n for n in listed if n.startswith('nbs/')]) == len(NOTEBOOKS) - 1
    for i, (n, (_, _, minutes)) in enumerate(zip(stops, table)):
        cells = keeper.read(ROOT/'nbs'/n)['cells']
        assert re.search(rf'^\*Stop {i + 1} of {len(stops)} on .* · {minutes} minutes\*$', keeper.source(cells[0]), re.M)
        links = re.findall(r'\]\((.+?)\)', keeper.source(cells[-1]))
        seen = [os.path.relpath(ROOT/'nbs'/Path(n).parent/l.split('#')[0], ROOT/'nbs') for l in links]
        assert seen == [*stops[:i][-1:], 'index.ipynb', *stops[i + 1:][:1]]

def test_reading_path_is_looked_after():
    path = keeper.NBS/next(iter(keeper.PATH))
    def noticed(change, path=path):
        nb = keeper.read(path)
        change(nb['cells'])
        return keeper.with_path(path, nb) != nb
    assert not noticed(lambda cells: None)
    assert noticed(lambda cells: cells.pop()) and noticed(lambda cells: cells.reverse())
    assert noticed(lambda cells: cells[0].update(source='# Title\n\n> Promise\n\n*Stop 9 of 11 on the path*'))
    assert noticed(lambda cells: cells[0].update(source='# Title\n\n> Promise\n\n*Stop 9 of 11*'), keeper.NBS/'01_synth.ipynb')
    assert noticed(lambda cells: cells.append(dict(id=keeper.PATH_FOOT, cell_type='markdown', source='')), keeper.NBS/'01_synth.ipynb')
    assert noticed(lambda cells: next(c for c in cells if c['id'] == keeper.PATH_TABLE).update(source=''), keeper.NBS/'index.ipynb')

def test_lessons_are_few():
    lessons = [p for p in NOTEBOOKS if re.match(r'\d\d_', p.name) and p.parent.name == 'nbs']
    assert len(lessons) <= keeper.MAX_LESSONS

def test_tidy_keeps_what_a_reader_wants():
    stream = dict(output_type='stream', name='stdout', text=['10%\r', '20%\rdone\n', 'next\n'])
    picture = dict(output_type='display_data', metadata={}, data={'image/png': 'p', 'image/jpeg': 'j', 'text/plain': 'Picture'})
    box = dict(output_type='display_data', metadata={}, data={keeper.WIDGET: {}, 'text/plain': 'VBox(children=())'})
    sliders = dict(output_type='execute_result', metadata={}, execution_count=1, data={'text/plain': 'interactive(children=())'})
    cell = dict(cell_type='code', metadata={'tags': ['x']}, source='', outputs=[stream, picture, box, sliders], execution_count=7)
    nb = keeper.tidy(dict(nbformat=4, nbformat_minor=5, metadata={'widgets': {}}, cells=[cell]), 'x')
    [cell] = nb['cells']
    assert cell['id'] and cell['execution_count'] is None and not nb['metadata']
    assert ''.join(cell['outputs'][0]['text']) == 'done\nnext\n'
    assert [set(o['data']) for o in cell['outputs'][1:]] == [{'image/jpeg', 'text/plain'}]
    assert keeper.tidy(nb, 'x') == nb

def test_failing_notebooks_fail_the_tests(tmp_path):
    "Each is named, with its traceback; the others run; cells flagged slow are left out unless asked for"
    cell = lambda source: dict(id='a', cell_type='code', metadata={}, source=source, outputs=[], execution_count=None)
    for name, source in dict(good='assert True', slow='#| slow\n1/0', bad='1/0', killed='import os; os._exit(3)').items():
        keeper.write(tmp_path/f'{name}.ipynb', dict(nbformat=4, nbformat_minor=5, metadata={}, cells=[cell(source)]))
    def tested(*argv):
        done = subprocess.run([sys.executable, ROOT/'.ci/notebooks.py', 'test', '--workers', '4', *argv], cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr
    status, out, err = tested('good.ipynb', 'slow.ipynb', 'bad.ipynb', 'killed.ipynb')
    assert status == 1 and out.count(': ok') == 2 and 'ZeroDivisionError' in err
    last = err.splitlines()[-1]
    assert last.startswith('2 of 4 notebooks failed:') and 'bad.ipynb' in last and 'killed.ipynb' in last
    assert tested('slow.ipynb', '--flags', 'slow')[0] == 1 and tested('good.ipynb')[0] == 0

# -- README and version ---------------------------------------------------------------------------------------------

def test_readme_is_its_notebook():
    text, images = keeper.readme()
    assert (ROOT/'README.md').read_text(encoding='utf-8') == text, 'make docs'
    stored = {f'images/{p.name}': p.read_bytes() for p in (ROOT/'nbs/images').glob('readme-*')}
    assert stored == images, 'make docs'

def test_readme_shows_what_a_reader_wants(tmp_path):
    "Hidden cells and directives go, pictures become files, links are seen from the root"
    cell = lambda i, source, *outputs: dict(id=f'c{i}', cell_type='code', metadata={}, source=source, execution_count=None, outputs=list(outputs))
    show = lambda mime, value: dict(output_type='display_data', metadata={}, data={mime: value})
    keeper.write(tmp_path/'index.ipynb', dict(nbformat=4, nbformat_minor=5, metadata={}, cells=[
        dict(id='m', cell_type='markdown', metadata={}, source='# T\n\n[a](00_a.ipynb) [b](../B.md) [c](https://x.org/c)\n```\n[d](e)\n```'),
        cell(1, '#| hide\nsecret = 1'), cell(2, '#| echo: false\nquiet = 2', show('text/markdown', 'said [f](g.md)')),
        cell(3, '#| fig-alt: a face\nloud = 3', show('image/jpeg', 'AAEC'))]))
    text, images = keeper.readme(tmp_path/'index.ipynb')
    for part in ('[a](nbs/00_a.ipynb) [b](B.md) [c](https://x.org/c)', '[d](e)', 'said [f](nbs/g.md)', 'loud = 3'): assert part in text
    for part in ('secret', 'quiet', '#|', 'fig-alt'): assert part not in text
    assert images == {'images/readme-c3-0.jpg': bytes([0, 1, 2])} and '![a face](nbs/images/readme-c3-0.jpg)' in text

def test_readme_leads_somewhere():
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    links = re.findall(r'\]\(([^)\s]+)\)', text) + re.findall(r'src="([^"]+)"', text)
    missing = [l for l in links if not re.match(r'\w+:|#', l) and not (ROOT/l.split('#')[0]).exists()]
    assert links and not missing

def test_readme_maps_every_notebook():
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    assert not [n for p in NOTEBOOKS if (n := name_of(p)) != 'nbs/index.ipynb' and f'({n})' not in text], 'make run NB=nbs/index.ipynb docs'

def test_version_is_the_same_everywhere():
    config = ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini', encoding='utf-8')
    assert config['DEFAULT']['version'] == deepfid.__version__

# -- order of imports -----------------------------------------------------------------------------------------------

LEVEL = {name: i for i, name in enumerate(deepfid.IMPORT_ORDER)}
DETECTORS = {f'models.{p.parent.name}' for p in PACKAGE.glob('models/*/detector.py')}

def imports(source, module):
    "Modules of deepfid that `source` of `module` imports: (name without 'deepfid.', at import time?)"
    def visit(node, lazy):
        if isinstance(node, ast.Import):
            yield from ((a.name, lazy) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split('.')[:-node.level] if node.level else []
            base = '.'.join(base + ([node.module] if node.module else []))
            yield from ((f'{base}.{a.name}', lazy) for a in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(('import_module', '__import__')):
            yield from ((a.value, lazy) for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))
        inside = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node): yield from visit(child, inside)
    return [(n, not lazy) for n, lazy in visit(ast.parse(source), False)]

def module_name(path):
    name = path.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.')
    return name.removesuffix('.__init__') + ('.__init__' if path.name == '__init__.py' else '')

def wrong_imports(source, module):
    "What `source` of `module` imports against the order, or of a detector from outside it"
    part = module.split('.')[1]
    own = '.'.join(module.split('.')[1:3])
    for name, _ in imports(source, module):
        top, _, rest = name.partition('.')
        if top != 'deepfid' or not (other := rest.split('.')[0]) or other not in LEVEL: continue
        detector = next((d for d in DETECTORS if f'{rest}.'.startswith(f'{d}.')), None)
        allowed = other == part or LEVEL[other] < LEVEL[part]
        if detector and own != detector and part not in ('experiments', 'testing'): allowed = False
        if other == 'testing' and part != 'testing': allowed = False
        if not allowed: yield f'{module} imports {name}'

def test_every_module_has_its_level():
    parts = {module_name(p).split('.')[1] for p in MODULES if p.parent != PACKAGE or p.name not in ('__init__.py', '__main__.py', '_modidx.py', '_nbdev.py')}
    assert parts <= set(LEVEL), f'not in deepfid.IMPORT_ORDER: {parts - set(LEVEL)}'

@pytest.mark.parametrize('path', [p for p in MODULES if p.parent != PACKAGE or p.name[0] != '_'], ids=name_of)
def test_imports_go_from_later_to_earlier(path):
    assert not list(wrong_imports(path.read_text(encoding='utf-8'), module_name(path)))

def test_order_of_imports_is_looked_after():
    wrong = lambda source, module: bool(list(wrong_imports(source, module)))
    assert wrong('from deepfid.data.forge import swap', 'deepfid.core')
    assert wrong('from ..quality.mapping import FidelityMapping', 'deepfid.data.forge')
    assert wrong('def f():\n import deepfid.evaluate.metrics', 'deepfid.models.deepfidelity.detector')
    assert wrong('from ..local_similarity.llsm import LLSM', 'deepfid.models.deepfidelity.detector')
    assert wrong('from .deepfidelity.detector import DeepFidelity', 'deepfid.models.base')
    assert wrong('def f(): from ..models.deepfidelity.detector import DeepFidelity', 'deepfid.inference.scorer')
    assert wrong('def f(): importlib.import_module("deepfid.models.lisiam.network")', 'deepfid.explore.maps')
    assert wrong('from .testing import tiny', 'deepfid.cli')
    assert wrong('from . import cli', 'deepfid.core')
    assert not wrong('from .forge import swap\nfrom ..core import Face\nimport deepfid', 'deepfid.data.manifest')
    assert not wrong('from ..models.deepfidelity.detector import DeepFidelity', 'deepfid.experiments.deepfidelity')

def test_no_circle_inside_a_package():
    "Modules of one package may use each other, but not in a circle"
    names = {module_name(p): p for p in MODULES}
    uses = {m: {n for o, now in imports(p.read_text(encoding='utf-8'), m) if now
                for n in (o, o.rpartition('.')[0]) if n in names and n != m} for m, p in names.items()}
    while uses:
        free = [m for m, used in uses.items() if not used & set(uses)]
        assert free, f'import each other in a circle: {sorted(uses)}'
        for m in free: del uses[m]

@pytest.mark.parametrize('path', [p for p in MODULES if not name_of(p).startswith('deepfid/explore')], ids=name_of)
def test_no_notebook_tools_at_import_time(path):
    names = [n.split('.')[0] for n, now in imports(path.read_text(encoding='utf-8'), module_name(path)) if now]
    assert not {'nbdev', 'IPython', 'ipywidgets', 'execnb'} & set(names)

@pytest.mark.parametrize('module, heavy', [('deepfid', 'numpy torch fastai cv2 matplotlib'), ('deepfid.core', 'torch fastai IPython'),
    ('deepfid.cli', 'torch fastai pandas matplotlib scipy sklearn')])
def test_import_is_light(module, heavy):
    code = f'import sys, {module}; print(*(m for m in {heavy.split()} if m in sys.modules))'
    assert run(sys.executable, '-c', code, cwd=ROOT).split() == []

# -- recorded results -----------------------------------------------------------------------------------------------

RECORD = dict(config=dict, data=str, seed=(int, list), commit=str, hardware=str, versions=dict, seconds=(int, float), metrics=dict)

def record_problems(r):
    "What is missing in recorded result `r`, as CONTRIBUTING.md describes it"
    for key, kind in RECORD.items():
        if not isinstance(r.get(key), kind): yield f'{key} is missing or of the wrong kind'
    if not re.fullmatch(r'[0-9a-f]{7,40}', str(r.get('commit'))): yield 'commit is no git hash'
    metrics = r.get('metrics') or {}
    if not metrics: yield 'no metrics'
    for name, m in metrics.items() if isinstance(metrics, dict) else ():
        if not (isinstance(m, dict) and {'value', 'low', 'high'} <= set(m)): yield f'{name} lacks value, low or high'
        elif not m['low'] <= m['value'] <= m['high']: yield f'the interval of {name} does not hold its value'

@pytest.mark.parametrize('path', sorted((ROOT/'nbs/results').glob('*.json')), ids=lambda p: p.stem)
def test_recorded_result_is_complete(path):
    assert not list(record_problems(json.loads(path.read_text(encoding='utf-8'))))

def test_records_are_looked_after():
    good = dict(config={'epochs': 8}, data='synthetic', seed=0, commit='0123abc', hardware='2 cores', versions={'torch': '2'},
                seconds=9., metrics={'auc': dict(value=.8, low=.7, high=.9)})
    assert not list(record_problems(good))
    for key in good: assert list(record_problems({k: v for k, v in good.items() if k != key})), key
    assert list(record_problems(dict(good, metrics={'auc': .8})))
    assert list(record_problems(dict(good, metrics={'auc': dict(value=.8, low=.9, high=.95)})))

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_recorded_results_that_a_notebook_shows_exist(path):
    text = ''.join(keeper.source(c) for c in keeper.code(keeper.read(path)))
    names = re.findall(r"""(?i)results['")\s]*/\s*f?['"]?([\w.-]+\.json)""", text)
    assert not [n for n in names if not (ROOT/'nbs/results'/n).exists()]

# -- packaging ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def wheel(checkout):
    "The wheel built from the sdist that is built from the project's files"
    settings = (checkout/'settings.ini').read_text(encoding='utf-8')
    (checkout/'settings.ini').write_text(re.sub('(?m)^git_url =.*', 'git_url = https://example.org/me/deepfid', settings), encoding='utf-8')
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', checkout/'dist', checkout, cwd=checkout.parent)
    [built] = (checkout/'dist').glob('*.whl')
    return built

def test_wheel_from_sdist_imports_and_finds_its_data(wheel, tmp_path):
    target = tmp_path/'site'
    run(sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', '--target', target, wheel, cwd=tmp_path)
    code = '''if True:
        import importlib, pkgutil, sys, deepfid
        from importlib.resources import files
        for m in pkgutil.walk_packages(deepfid.__path__, 'deepfid.'): importlib.import_module(m.name); print('module', m.name)
        for f in (files('deepfid')/'weights').rglob('*'): print('weights', f.relative_to(files('deepfid')/'weights').as_posix())
        print('from', deepfid.__file__)'''
    lines = run(sys.executable, '-c', code, cwd=tmp_path, PYTHONPATH=str(target)).splitlines()
    told = lambda kind: {l.split(' ', 1)[1] for l in lines if l.startswith(kind + ' ')}
    assert told('from') == {str(target/'deepfid/__init__.py')}, 'another deepfid was imported'
    here = {module_name(p).removesuffix('.__init__') for p in project_files() if p.suffix == '.py' and PACKAGE in p.parents}
    assert told('module') | {'deepfid'} == here
    weights = {p.relative_to(PACKAGE/'weights').as_posix() for p in project_files() if PACKAGE/'weights' in p.parents}
    assert weights and weights <= told('weights')

def test_wheel_describes_itself(wheel):
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        read = lambda end: z.read(next(n for n in names if n.endswith(end))).decode()
        metadata, entry_points = read('METADATA'), read('entry_points.txt')
    assert f'Version: {deepfid.__version__}' in metadata and 'License-Expression: Apache-2.0' in metadata
    assert 'deepfid = deepfid.__main__:run_command' in entry_points
    assert any(n.endswith('licenses/LICENSE') for n in names) and not any(n.startswith(('tests', 'nbs')) for n in names)
    body = metadata.split('\n\n', 1)[1]
    relative = [l for l in re.findall(r'\]\(([^)\s]+)\)|<img src="([^"]+)"', body) for l in l if l and not re.match(r'\w+:|#', l)]
    assert not relative, 'a package index shows no relative pictures'

# -- the files themselves -------------------------------------------------------------------------------------------

MACHINE = re.compile(r'(?<![\w.:~/-])/(?:home|root|work|Users|tmp|mnt|private|var/folders)/[\w.-]+|\b[A-Z]:\\\\?Users\b')

def words(path):
    "The text of a project file; of a notebook, without its pictures. Empty for binary files"
    if path.suffix == '.ipynb':
        nb = keeper.read(path)
        outputs = [o.get('text', '') or [v for k, v in o.get('data', {}).items() if not k.startswith('image/')]
                   for c in keeper.code(nb) for o in c['outputs']]
        return json.dumps([[c['source'] for c in nb['cells']], outputs], ensure_ascii=False)
    try: return path.read_text(encoding='utf-8')
    except UnicodeDecodeError: return ''

def test_no_file_names_a_place_on_someones_machine():
    found = {name_of(p): m[0] for p in project_files() if p != Path(__file__).resolve() and (m := MACHINE.search(words(p)))}
    assert not found

def test_places_on_machines_are_noticed():
    for text in ('"/home/me/x"', ' /root/.cache', "PosixPath('/tmp/tmpab')", r'C:\Users\me', '/Users/me'): assert MACHINE.search(text)
    for text in ('https://x.org/home/me', '../shared/data', '/usr/bin/env', 'out/tmp/x', '~/home/x'): assert not MACHINE.search(text)

OWN_NAME = re.compile(r"\bpip3? install (?:-\S+ )*[\"'\\]*deepfid\b")

def test_no_text_tells_pip_to_fetch_our_name_from_an_index():
    "Whatever an index has under it is somebody else's"
    assert not {name_of(p): m[0] for p in project_files() if p != Path(__file__).resolve() and (m := OWN_NAME.search(words(p)))}
    for text in ("pip install 'deepfid[app]'", 'pip install -U deepfid', 'pip install "deepfid[app]"'): assert OWN_NAME.search(text)
    for text in ("pip install '.[app]' in a clone of deepfid", 'pip install voila'): assert not OWN_NAME.search(text)

def test_the_root_stays_small():
    allowed = '''.ci .github .gitignore .pre-commit-config.yaml CHANGELOG.md CITATION.cff CONTRIBUTING.md LICENSE MANIFEST.in Makefile README.md constraints.txt deepfid nbs pyproject.toml
        settings.ini setup.py tests PKG-INFO setup.cfg'''.split()
    assert not {p.relative_to(ROOT).parts[0] for p in project_files()} - set(allowed)

def test_constraints_pin_everything_exactly():
    lines = [l for l in (ROOT/'constraints.txt').read_text(encoding='utf-8').splitlines() if l and l[0] != '#']
    assert not [l for l in lines if not re.fullmatch(r'[a-z0-9-]+==[0-9][0-9a-z.]*', l)], 'no local versions, paths or ranges'
    pins = dict(l.split('==') for l in lines)
    config = ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini', encoding='utf-8')
    asked = (config['DEFAULT']['requirements'] + ' ' + config['DEFAULT']['dev_requirements']).split()
    assert not [r for r in asked if re.split(r'[<>=\[]', r)[0] not in pins]
