"The words of the field: what WORDS of the project's own must not come back, in names, docstrings, messages and prose"
import ast, importlib.util, re
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT/'deepfid'
MODULES = sorted(p for p in PACKAGE.rglob('*.py') if p.name not in ('_modidx.py', '__init__.py', '_nbdev.py'))

# Identifiers that have a name in the field: fastai's, scikit-learn's, timm's or the paper's
BANNED_NAMES = set('''BumpModule WaveModule STRIP shake ROOM on_map off_by SUMS seal check_seal Verdict Cut doubts says judge Quote Quoted
    _hush gains who apart each_its_own along home walk Cutting cut_clip Judgeability film moving_faces changed complain LEAST REAL_SETTINGS
    settle asked keeps usual readings squeeze rerender either lean accidents _learning_nothing blind_mask heaps spoil spoiled
    SamplePlaces sample_places place_box place_board place_picture read_photo Picture DrawnSource draw_face draw_person VERBS
    bare share_model Part verdict_html heaps_html damage_sliders'''.split())

# Words of prose, with what the field says instead
BANNED_WORDS = {
    r'pictures?': 'image, figure', r'spoil(s|ed|ing)?': 'degrade', r'heaps?': 'confusion matrix', r'told apart': 'significant',
    r'drawn (faces?|people|pairs?)': 'synthetic', r'blind (mask|map)s?': 'mean-mask baseline', r'foils?': 'baseline',
    r'map of pairs': 'pairwise similarity matrix', r'plaid': 'pairwise similarity matrix', r'gone on with': 'resumed',
    r'(the|of|which|each|every|two|all|these|some|other|many|few|same) places': 'positions', r'place of (a|the) map': 'position',
    r'(the|a|of|its|own|this|that|which|every|each) rooms?': 'package, module', r'reals accused': 'false positive rate',
    r'accused': 'false alarm', r'seals?|sealed': 'checksums', r'(the|which|each|every) verbs?': 'command'}
WORD = re.compile(r'\b(?:' + '|'.join(BANNED_WORDS) + r')\b', re.I)

def load_keeper():
    spec = importlib.util.spec_from_file_location('keeper', ROOT/'.ci/notebooks.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

keeper = load_keeper()

def names_in(tree):
    "Every name that a module defines: functions, classes, arguments, attributes of self, module-level variables"
    for n in ast.walk(tree):
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)): yield n.name
        if isinstance(n, ast.arg): yield n.arg
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store): yield n.attr
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store): yield n.id

def strings_in(tree):
    "Every string of a module, docstrings and messages included"
    return [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]

def comments_in(source): return [l.partition('#')[2] for l in source.splitlines() if '#' in l and not l.lstrip().startswith('# %%')]

def banned(text):
    "The banned words of a text, each with its surroundings; names of settings in old files are read, not spoken"
    text = '\n'.join(l for l in text.splitlines() if 'legacy_settings' not in l)
    return [f'...{text[max(0, m.start()-30):m.end()+30]!r}' for m in WORD.finditer(text)]

@pytest.mark.parametrize('path', MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_module_speaks_the_words_of_the_field(path):
    source = path.read_text(encoding='utf-8')
    tree = ast.parse(source)
    assert not BANNED_NAMES & set(names_in(tree))
    assert not [b for text in [*strings_in(tree), *comments_in(source)] for b in banned(text)]

@pytest.mark.parametrize('path', keeper.notebooks(), ids=lambda p: p.stem)
def test_prose_speaks_the_words_of_the_field(path):
    cells = keeper.read(path)['cells']
    assert not [b for c in cells for b in banned(keeper.source(c))]

@pytest.mark.parametrize('name', ['README.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'settings.ini', 'Makefile'])
def test_files_speak_the_words_of_the_field(name):
    assert not banned((ROOT/name).read_text(encoding='utf-8'))

def test_banned_words_are_noticed():
    for text in ('a picture of it', 'faces are spoiled', 'all places of the map', 'not told apart', 'drawn faces', 'every room'): assert banned(text)
    for text in ('it takes place', 'in place', 'replaced', 'an image', 'the positions', 'a placeholder', 'room for more'): assert not banned(text)
    assert BANNED_NAMES & set(names_in(ast.parse('def settle(self, x): pass')))

def test_module_docstrings_are_noun_phrases():
    "One phrase that a search would find: no sentence, no question, no full stop"
    wrong = {}
    for path in MODULES:
        doc = ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or ''
        if not 10 < len(doc) < 160 or doc.rstrip().endswith(('.', '?', '!')) or re.match(r'(How|What|Why|Would|Does|Is|Are|One|We|I)\b', doc):
            wrong[path.relative_to(ROOT).as_posix()] = doc
    assert not wrong

def test_no_public_name_has_two_homes():
    homes = {}
    for path in MODULES:
        for n in ast.parse(path.read_text(encoding='utf-8')).body:
            if isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', '') == '__all__':
                for name in ast.literal_eval(n.value): homes.setdefault(name, []).append(path.relative_to(ROOT).as_posix())
    assert not {n: h for n, h in homes.items() if len(h) > 1}

def test_patch_is_for_lessons():
    "Classes stand whole: fastcore's `patch` grows one only in a lesson, at most three times"
    for path in keeper.notebooks():
        code = '\n'.join(keeper.source(c) for c in keeper.code(keeper.read(path)))
        patched = re.findall(r'^@patch.*\n(?:@.*\n)*def \w+\(\w+:\s*(\w+)', code, re.M)
        allowed = 0 if path.parent.name == 'lib' else 3
        assert max((patched.count(c) for c in patched), default=0) <= allowed, path.name
