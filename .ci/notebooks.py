"""Keeps the notebooks in order. `make run`, `make docs` and tests/test_house.py use it.

    python .ci/notebooks.py test [FILE ...]         run them as tests, --workers at a time; exit status 1 if one fails
    python .ci/notebooks.py run nbs/lib/core.ipynb   execute as nbdev-test does, keep the outputs, clean
    python .ci/notebooks.py clean [FILE ...]        clean (all of them, if none is named)
    python .ci/notebooks.py check [FILE ...]        say what is out of order; exit status 1 if anything is
    python .ci/notebooks.py path                    write the reading path into its stops and nbs/index.ipynb
    python .ci/notebooks.py readme                  render README.md from nbs/index.ipynb
"""
import argparse, base64, copy, gc, hashlib, importlib, io, json, multiprocessing, os, posixpath, re, subprocess, sys, time
from multiprocessing.connection import wait
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS, IMAGES = ROOT/'nbs', 'images'
MAX_KB, MAX_LINES = 400, {'lib': 60} # lines of a cell without a class; in a lesson 30
MAX_WIDTH = {'lib': 120} # characters of a line of code; of a lesson, which is read in a browser, 100
MAX_LESSONS, MAX_LINES_BEFORE_PROSE = 26, 12
# Loaded once, before many notebooks are tested
PRELOADED = ('torch', 'torchvision', 'timm', 'fastai.vision.all', 'pandas', 'scipy.stats', 'sklearn.metrics', 'cv2', 'matplotlib.pyplot',
             'ipywidgets', 'nbdev.test')
WIDGET = 'application/vnd.jupyter.widget-view+json'

# The reading path, in its order: notebook below nbs, and how the path calls it. All that speaks of the path is written from this list.
PATH = {
    'tutorials/first_look.ipynb': 'A first look',
    '02_forge.ipynb': 'Faces and manipulation methods',
    '50_metrics.ipynb': 'What scores are worth',
    '12_mapping.ipynb': 'From quality to fidelity',
    '20_ssaa.ipynb': 'The mirror: SSAA',
    '23_deepfidelity.ipynb': 'DeepFidelity',
    '31_llsm.ipynb': 'Which positions differ?',
    '32_local_similarity.ipynb': 'Where is it forged?',
    '41_lisiam.ipynb': 'The same face twice',
    'tutorials/what_helps.ipynb': 'What helps, and when',
    'tutorials/your_own_photos.ipynb': 'Your own photographs'}
PATH_FOOT, PATH_TABLE, OTHER_NOTEBOOKS = 'path-foot', 'path-table', 'other-notebooks' # ids of cells that are written, not edited
WORDS_A_MINUTE, CELLS_A_MINUTE = 200, 4 # of prose, and of code that is shown, with its output

def notebooks():
    "Every notebook of the project: lessons and index, then `lib` and `tutorials`"
    return sorted(p for p in NBS.rglob('*.ipynb') if not any(s[0] in '._' for s in p.relative_to(NBS).parts))

def read(path): return json.loads(Path(path).read_text(encoding='utf-8'))
def write(path, nb):
    text = json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n'
    Path(path).write_text(text, encoding='utf-8', newline='\n')

def source(cell): return ''.join(cell['source'])
def code(nb): return [c for c in nb['cells'] if c['cell_type'] == 'code']
def directives(cell):
    "The `#| name: value` lines on top of a cell, as a dict"
    lines = re.match(r'(\s*#\s*\|.*\n?)*', source(cell))[0].splitlines()
    pairs = (re.match(r'\s*#\s*\|\s*([\w-]+)[:\s]*(.*)', l) for l in lines)
    return {m[1]: m[2].strip() for m in pairs if m}

# -- cleaning -------------------------------------------------------------------------------------------------------

def _text(o, f):
    "Apply `f` to text that a notebook keeps as a string or as a list of lines"
    return f(o) if isinstance(o, str) else f(''.join(o)).splitlines(keepends=True)

def _is_noise(output):
    "Does `output` only make sense beside a running kernel: a warning, a widget, nothing at all?"
    if output['output_type'] == 'stream': return output['name'] == 'stderr' or not ''.join(output['text']).strip()
    data = output.get('data')
    if data is None: return False
    widget = re.match(r'\s*(\w*Box|\w*Output|\w+Explorer|interactive)\(', ''.join(data.get('text/plain', '')))
    return not data or (set(data) == {'text/plain'} and bool(widget))

def _tidy_output(output):
    if output['output_type'] == 'stream' and '\r' in ''.join(output['text']):
        output['text'] = _text(output['text'], lambda s: re.sub(r'[^\n]*\r(?!\n)', '', s))
    data = output.get('data', {})
    data.pop(WIDGET, None)
    if 'image/jpeg' in data: data.pop('image/png', None)

def tidy(nb, name=''):
    "A copy of notebook `nb` without what changes from run to run: counts, widget state, warnings, progress bars"
    from nbdev.clean import clean_nb
    nb = copy.deepcopy(nb)
    nb['metadata'].pop('widgets', None)
    for i, c in enumerate(nb['cells']):
        c.setdefault('id', hashlib.sha1(f'{name}:{i}'.encode()).hexdigest()[:8])
    for c in code(nb):
        for o in c['outputs']: _tidy_output(o)
        c['outputs'] = [o for o in c['outputs'] if not _is_noise(o)]
    clean_nb(nb)
    return nb

def clean(paths):
    "Clean notebooks in place"
    for p in paths:
        old = read(p)
        new = tidy(old, p.stem)
        if new != old: write(p, new); print('cleaned', p.relative_to(ROOT))

def _smaller(mime, text):
    "A freshly made picture with fewer bytes, if it has many: JPEG at a lower quality, PNG (a plot) in 64 colours"
    from PIL import Image
    image, out = Image.open(io.BytesIO(base64.b64decode(text))), io.BytesIO()
    if mime == 'image/jpeg': image.save(out, 'JPEG', quality=50, optimize=True)
    else: image.convert('RGB').quantize(64).save(out, 'PNG', optimize=True)
    return min(text, base64.b64encode(out.getvalue()).decode(), key=len)

def lighten(path, limit=20_000):
    "Pictures of more than `limit` characters in a notebook that was just executed, made smaller"
    nb = read(path)
    for output in (o for c in code(nb) for o in c['outputs']):
        for mime, text in output.get('data', {}).items():
            text = ''.join(text)
            if mime in ('image/jpeg', 'image/png') and len(text) > limit: output['data'][mime] = _smaller(mime, text)
    write(path, nb)

def run(paths):
    "Execute notebooks as the tests do, but keep their outputs; returns how many failed"
    env = dict(os.environ, MPLBACKEND='module://matplotlib_inline.backend_inline', PYTHONUNBUFFERED='1')
    env.setdefault('OMP_NUM_THREADS', '1')
    failed = 0
    for p in paths:
        start = time.time()
        cmd = [Path(sys.executable).with_name('nbdev-test'), p, '--save', '--n-workers', '0']
        bad = subprocess.run(cmd, cwd=ROOT, env=env, stdout=subprocess.DEVNULL).returncode
        lighten(p)
        clean([p])
        print(f"{p.relative_to(ROOT)}: {'FAILED' if bad else 'ok'}, {time.time()-start:.0f} s, {p.stat().st_size/1024:.0f} KB")
        failed += bool(bad)
    return failed

# -- testing --------------------------------------------------------------------------------------------------------

def _warm_up(paths):
    "Import, make and train once what many notebooks need: their processes, forks of this one, find it in memory"
    for name in PRELOADED: importlib.import_module(name)
    import cv2, torch
    from deepfid import testing
    torch.set_num_threads(1), cv2.setNumThreads(1) # a fork does not have the threads of its parent
    text = ' '.join(p.read_text(encoding='utf-8') for p in paths)
    for name, epochs in sorted(set(re.findall(r'\b(tiny_manifest|tiny_detector)\((\d*)\)', text))):
        getattr(testing, name)(*map(int, epochs))
    if len(re.findall(r'= train_live\(', text)) > 1:
        from deepfid.experiments.live import live_pairs
        live_pairs() # one set of faces for all lessons
    gc.collect(), gc.freeze()

def _run_test(path, flags):
    "Run one notebook, in a process of its own; exit status 1 if it fails"
    from nbdev.config import get_config
    from nbdev.test import test_nb
    config = get_config(ROOT)
    passed, seconds = test_nb(path, skip_flags=config.tst_flags.split(), force_flags=flags, basepath=config.config_path,
                              cell_timeout=int(config.cell_timeout))
    used = sum(os.times()[:4])
    print(f"{os.path.relpath(path, ROOT)}: {'ok' if passed else 'FAILED'}, {seconds:.0f} s, {used:.1f} s of processor time",
          file=sys.__stdout__, flush=True) # a cell that was timed out may still hold the other one
    sys.exit(not passed)

def test(paths, workers=2, flags=()):
    "Run notebooks, `workers` at a time, the short ones of `lib` last; returns those that failed"
    forked = sys.platform == 'linux' # then each notebook runs in a fork of this process
    if forked and len(paths) > workers: _warm_up(paths)
    context = multiprocessing.get_context('fork' if forked else 'spawn')
    waiting, running, failed = sorted(paths, key=lambda p: (p.parent.name == 'lib', p)), {}, []
    while waiting or running:
        while waiting and len(running) < workers:
            path = waiting.pop(0)
            process = context.Process(target=_run_test, args=(path, flags))
            process.start()
            running[process.sentinel] = process, path
        for ended in wait(running):
            process, path = running.pop(ended)
            process.join()
            if process.exitcode: failed.append(path)
    return failed

# -- checking -------------------------------------------------------------------------------------------------------

def _structure(nb, path):
    "What is wrong with the cells of `nb`"
    ids = [c.get('id', '') for c in nb['cells']]
    if (nb['nbformat'], nb['nbformat_minor']) != (4, 5): yield 'is not in format 4.5, the first with cell ids'
    if len(set(ids)) < len(ids): yield 'two cells share an id'
    if not all(re.fullmatch(r'[\w-]{1,64}', i) for i in ids): yield 'a cell has no valid id'
    first = nb['cells'][0] if nb['cells'] else {'cell_type': 'code', 'source': ''}
    if first['cell_type'] != 'markdown' or not re.match(r'# \S.*\n+> \S', source(first)):
        yield 'the first cell must be a title (# ...) and a one-line promise (> ...)'
    yield from _module(nb, path)
    width, most = MAX_WIDTH.get(path.parent.name, 100), MAX_LINES.get(path.parent.name, 30)
    for c in code(nb):
        lines = source(c).split('\n')
        whole_class = 'export' in ' '.join(directives(c)) and any(l.startswith(('class ', '@dataclass')) for l in lines)
        if len(lines) > most and not whole_class:
            yield f"cell {c['id']} has {len(lines)} lines of code, more than {most}"
        if wide := [l for l in lines if len(l) > width]:
            yield f"cell {c['id']} has a line of {len(wide[0])} characters, more than {width}: {wide[0].strip()[:40]}"

def _module(nb, path):
    "What is wrong with what `nb` exports: lib/NAME.ipynb writes the module NAME, a lesson NN_name.ipynb any module"
    exps = [d['default_exp'] for c in code(nb) if 'default_exp' in (d := directives(c))]
    if path.parent.name == 'lib':
        if exps != [path.stem]: yield f'must have one `#| default_exp {path.stem}`, not {exps}'
        return
    lesson = re.match(r'\d\d_\w+$', path.stem)
    if lesson and len(exps) != 1: yield f'a lesson exports to a module: one `#| default_exp`, not {exps}'
    if not lesson and exps: yield 'has no number, so it is no lesson and exports nothing'
    before = 0
    for c in nb['cells'][1:]:
        if c['cell_type'] == 'markdown': break
        before += source(c).count('\n') + 1
    if lesson and before > MAX_LINES_BEFORE_PROSE:
        yield f'{before} lines of code stand before the first sentence, more than {MAX_LINES_BEFORE_PROSE}'

def _outputs(nb):
    "What is wrong with the outputs of `nb`"
    if 'widgets' in nb['metadata']: yield 'holds widget state'
    for c in code(nb):
        cid = c.get('id')
        if c['execution_count'] is not None: yield f'cell {cid} has an execution count'
        for o in c['outputs']:
            if o.get('execution_count') is not None: yield f'an output of cell {cid} has an execution count'
            if o['output_type'] == 'error': yield f"cell {cid} holds an error: {o['ename']}"
            if WIDGET in o.get('data', {}): yield f'cell {cid} holds a widget view'
            if '\r' in ''.join(o.get('text', '')): yield f'cell {cid} holds the remains of a progress bar'

def problems(path):
    "All that is out of order in the notebook at `path`: a list of lines, empty if all is well"
    path, nb = Path(path), read(path)
    found = [*_structure(nb, path), *_outputs(nb)]
    if path.resolve().is_relative_to(NBS) and with_path(path, nb) != nb: found.append('does not agree with the reading path: make docs')
    kb = path.stat().st_size/1024
    if kb > MAX_KB: found.append(f'has {kb:.0f} KB, more than {MAX_KB}')
    if not found and tidy(nb, path.stem) != nb: found.append('is not clean: make docs')
    return [f'{path.name}: {o}' for o in found]

# -- the reading path -----------------------------------------------------------------------------------------------

def describe(path):
    "Title, promise, modules and minutes of the notebook at `path`; minutes follow from words, cells and live trainings, rounded to 5"
    nb = read(path)
    title, _, rest = source(nb['cells'][0]).removeprefix('# ').partition('\n')
    words = sum(len(source(c).split()) for c in nb['cells'] if c['cell_type'] == 'markdown' and c['id'] != PATH_FOOT)
    told = [directives(c) for c in code(nb)]
    shown = sum(not {'hide', 'default_exp'} & set(d) for d in told)
    modules = [d[k] for d in told for k in ('default_exp', 'export', 'exports') if d.get(k)]
    live = sum(bool(re.search(r'= train_live\(', source(c))) for c in code(nb)) # each trains for a minute
    minutes = max(5, 5*int((words/WORDS_A_MINUTE + shown/CELLS_A_MINUTE + live)/5 + .5))
    return dict(title=title.strip(), promise=rest.partition('> ')[2].partition('\n')[0].strip(),
                modules=list(dict.fromkeys(modules)), minutes=minutes)

def link_from(start, name):
    "Relative link to notebook `name` below nbs from notebook `start` below nbs"
    return posixpath.relpath(name, posixpath.dirname(start) or '.')

def path_head(name):
    "The line below the title of a stop"
    index = link_from(name, 'index.ipynb#where-to-begin')
    stop = f'Stop {[*PATH].index(name) + 1} of {len(PATH)} on the [reading path]({index})'
    return f"*{stop}: {PATH[name]} · {describe(NBS/name)['minutes']} minutes*"

def path_foot(name):
    "The last cell of a stop: what came before, what comes next"
    names, i = [*PATH], [*PATH].index(name)
    def link(j, label): return f'{label}: [{j + 1}. {PATH[names[j]]}]({link_from(name, names[j])})' if 0 <= j < len(names) else ''
    index = f"[reading path]({link_from(name, 'index.ipynb#where-to-begin')})"
    return ' · '.join(filter(None, [link(i - 1, '← Previous'), index, link(i + 1, 'Next')])) + ' →'*(i + 1 < len(names))

def path_table():
    "The reading path as the README shows it"
    stops = [dict(describe(NBS/n), name=n, stop=title) for n, title in PATH.items()]
    hours = f"{round(sum(s['minutes'] for s in stops)/30)/2:g}"
    rows = [f"| {i} | [{s['stop']}]({s['name']}) | {s['promise']} | {s['minutes']} |" for i, s in enumerate(stops, 1)]
    return '\n'.join([f'{len(stops)} stops, about {hours} hours in all, lead from the first face to your own photographs. Each can be read alone.',
                      f'A minute is {WORDS_A_MINUTE} words, {CELLS_A_MINUTE} code cells with what they show, or a live training. Terms are explained in the [glossary](glossary.ipynb).',
                      '', '| | stop | what it shows | minutes |', '|---|---|---|---|', *rows])

def _shelf(title, paths):
    "A titled list of notebooks"
    rows = [f'**{title}**', '', '| notebook | module | what it is about |', '|---|---|---|']
    for path in paths:
        d = describe(path)
        rows.append(f"| [{d['title']}]({path.relative_to(NBS).as_posix()}) | {', '.join(f'`{m}`' for m in d['modules'])} | {d['promise']} |")
    return '\n'.join(rows)

def other_notebooks():
    "All notebooks beside the reading path, in one folded list, as the README shows it"
    rest = [p for p in notebooks() if p.relative_to(NBS).as_posix() not in {*PATH, 'index.ipynb', 'glossary.ipynb'}]
    shelves = {'nbs': 'Lessons, in reading order', 'tutorials': 'Tutorials', 'lib': 'The library'}
    assert {p.parent.name for p in rest} <= set(shelves), 'a notebook on no shelf'
    lists = [_shelf(title, [p for p in rest if p.parent.name == folder]) for folder, title in shelves.items()]
    summary = f'All other notebooks: {len(rest)}, lessons and library'
    return f'<details><summary>{summary}</summary>\n\n' + '\n\n'.join(lists) + '\n\n</details>'

def _written(nb, cid, text):
    "Put `text` into the Markdown cell with id `cid`, which is appended where there is none"
    cell = next((c for c in nb['cells'] if c['id'] == cid), None)
    if cell is None: nb['cells'].append(cell := dict(cell_type='markdown', id=cid, metadata={}))
    cell['source'] = text.splitlines(keepends=True)
    return cell

def with_path(path, nb):
    "A copy of notebook `nb` of the project with what it says of the reading path as it must be"
    name, nb = Path(path).resolve().relative_to(NBS).as_posix(), copy.deepcopy(nb)
    if name == 'index.ipynb':
        _written(nb, PATH_TABLE, path_table())
        _written(nb, OTHER_NOTEBOOKS, other_notebooks())
        return nb
    first = nb['cells'][0]
    title = re.sub(r'\n+\*Stop \d+ of .*', '', source(first))
    nb['cells'] = [c for c in nb['cells'] if c['id'] != PATH_FOOT]
    if name in PATH:
        title = title.rstrip() + '\n\n' + path_head(name)
        _written(nb, PATH_FOOT, path_foot(name))
    if title != source(first): first['source'] = title.splitlines(keepends=True)
    return nb

def write_path():
    "Write the reading path into its stops, then into the index"
    for p in [*(p for p in notebooks() if p.name != 'index.ipynb'), NBS/'index.ipynb']:
        old = read(p)
        new = with_path(p, old)
        if new != old: write(p, new); print('path written:', p.relative_to(ROOT))

# -- README.md ------------------------------------------------------------------------------------------------------

def _from_root(text):
    "Relative links and pictures in Markdown `text` of nbs/index.ipynb, as seen from the root"
    def move(m): return m[1] + (posixpath.normpath('nbs/' + m[2]) if not re.match(r'\w+:|#|/', m[2]) else m[2])
    parts = re.split(r'(?ms)(^```.*?^```)', text)
    return ''.join(p if p.startswith('```') else re.sub(r'(\]\(|\bsrc=")([^)"\s]+)', move, p) for p in parts)

def _show_output(cell, i, output, images):
    "`output` number `i` of `cell` as README.md shows it; a picture goes into `images`"
    data = output.get('data', {})
    for mime, ext in (('image/jpeg', 'jpg'), ('image/png', 'png')):
        if mime in data:
            name = f"{IMAGES}/readme-{cell['id']}-{i}.{ext}"
            images[name] = base64.b64decode(''.join(data[mime]))
            output['data'] = {'text/markdown': f"![{directives(cell).get('fig-alt', '')}](nbs/{name})"}
            return output
    if 'text/markdown' in data: output['data'] = {'text/markdown': _from_root(''.join(data['text/markdown']))}
    return output

def _show_cell(cell, images):
    "`cell` as README.md shows it: no directives, no source with `echo: false`, pictures moved into `images`"
    if cell['cell_type'] == 'markdown': return dict(cell, source=_from_root(source(cell)))
    d = directives(cell)
    outputs = [] if d.get('output') == 'false' else cell['outputs']
    outputs = [_show_output(cell, i, copy.deepcopy(o), images) for i, o in enumerate(outputs)]
    text = '' if d.get('echo') == 'false' else re.sub(r'\A(\s*#\s*\|.*\n?)+', '', source(cell)).strip()
    return dict(cell, source=text, outputs=outputs, metadata={} if text else {'tags': ['no-source']})

def readme(path=NBS/'index.ipynb'):
    "The text of README.md and its pictures {name under nbs: bytes}, rendered from the notebook at `path`"
    import nbformat
    from nbconvert import MarkdownExporter
    from traitlets.config import Config
    nb, images = read(path), {}
    nb['cells'] = [_show_cell(c, images) for c in nb['cells'] if not {'hide', 'default_exp'} & set(directives(c))]
    tags = {'enabled': True, 'remove_input_tags': ['no-source']}
    exporter = MarkdownExporter(config=Config(TagRemovePreprocessor=tags))
    text, _ = exporter.from_notebook_node(nbformat.from_dict(nb))
    text = re.sub(r'\n{3,}', '\n\n', '\n'.join(l.rstrip() for l in text.splitlines())).strip()
    return f'<!-- Rendered from nbs/index.ipynb by `make docs`: edit the notebook, not this file. -->\n{text}\n', images

def write_readme():
    "Write README.md and its pictures"
    text, images = readme()
    for old in (NBS/IMAGES).glob('readme-*'):
        if f'{IMAGES}/{old.name}' not in images: old.unlink()
    for name, data in images.items():
        (NBS/name).parent.mkdir(exist_ok=True)
        (NBS/name).write_bytes(data)
    (ROOT/'README.md').write_text(text, encoding='utf-8', newline='\n')

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('command', choices=['test', 'run', 'clean', 'check', 'path', 'readme'])
    parser.add_argument('files', nargs='*', help='notebooks, or folders of them; all if none is named')
    parser.add_argument('--workers', type=int, default=2, help='test: how many notebooks at a time')
    parser.add_argument('--flags', default='', help='test: also cells with these flags, for instance "slow cuda"')
    args = parser.parse_intermixed_args()
    paths = [p for f in map(lambda f: Path(f).resolve(), args.files) for p in ([f] if f.is_file() else
             [p for p in notebooks() if f in p.parents])] if args.files else notebooks()
    if args.files and not paths: sys.exit(f'no notebook: {" ".join(args.files)}')
    if args.command == 'test':
        failed = test(paths, args.workers, args.flags.split())
        if failed: sys.exit(f"{len(failed)} of {len(paths)} notebooks failed: {' '.join(os.path.relpath(p, ROOT) for p in failed)}")
        print(f'{len(paths)} notebooks passed')
    if args.command == 'run': sys.exit(run(paths))
    if args.command == 'clean': clean(paths)
    if args.command == 'path': write_path()
    if args.command == 'readme': write_readme()
    if args.command == 'check':
        found = [line for p in paths for line in problems(p)]
        print('\n'.join(found) or f'{len(paths)} notebooks in order')
        sys.exit(bool(found))

if __name__ == '__main__': main()
