"""Builds the documentation site into out/site: README, reading path, lessons with their recorded outputs, library, API, glossary.

    python .ci/docs_site.py            build; warnings (a broken link, a cell that cannot be shown) are errors
    python .ci/docs_site.py --check    also look for pages that ask another host for anything

Nothing is executed and nothing is fetched: outputs are those stored in the notebooks, maths become MathML.
"""
import argparse, dataclasses, inspect, json, pkgutil, re, shutil, sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))
import notebooks as keeper # noqa: E402 - lies beside this file

SOURCE, SITE = ROOT/'out/site-source', ROOT/'out/site'
MAX_OPEN_LINES = 40 # a longer cell is folded, and so is one of imports, or one that records a result
IMPORTS = re.compile(r'(((import|from|set_style|if TYPE_CHECKING|set_seed)\b|rng = |    |\)).*\n|\n)*')
CSS = '''.main{min-width:0} .content{width:58em;max-width:100%;min-width:0} .content pre{font-size:.73rem}
.cell_output table{border-collapse:collapse;font-size:.85rem} .cell_output :is(th,td){border:0;padding:.15em .6em;text-align:right}
.cell_output thead tr:last-child th{border-bottom:1px solid currentcolor}
.cell_output table{border:0} .cell_output .text_html{overflow-x:auto}
.cell_output pre{white-space:pre-wrap} .cell_output img{max-width:100%;height:auto} math[display=block] mtd{padding:.25em .2em}
body[data-theme=dark] .cell_output img{filter:brightness(.88);border-radius:4px}
@media (prefers-color-scheme: dark){body:not([data-theme=light]) .cell_output img{filter:brightness(.88);border-radius:4px}}
'''

# -- notebooks ------------------------------------------------------------------------------------------------------

def show_cell(cell):
    "A notebook's cell as the site shows it, or None where it is hidden"
    if cell['cell_type'] != 'code': return dict(cell, source=keeper.source(cell))
    d = keeper.directives(cell)
    if {'hide', 'default_exp'} & set(d): return None
    text = re.sub(r'\A(\s*#\s*\|.*\n?)+', '', keeper.source(cell)).strip()
    tags = ['remove-input'] if d.get('echo') == 'false' or not text else []
    if d.get('output') == 'false': tags.append('remove-output')
    folded = d.get('code-fold') == 'true' or {'slow', 'cuda'} & set(d)
    if folded or text.count('\n') > MAX_OPEN_LINES or IMPORTS.fullmatch(text + '\n'): tags.append('hide-input')
    return dict(cell, source=text, metadata=dict(cell['metadata'], tags=tags))

def describe_images(nb):
    "Give the images among the outputs a text for readers who do not see them: the heading under which they stand"
    heading = ''
    for c in nb['cells']:
        if c['cell_type'] == 'markdown': heading = (re.findall(r'^#+ (.+)$', c['source'], re.M) or [heading])[-1]
        elif any(mime.startswith('image/') for o in c['outputs'] for mime in o.get('data', {})):
            text = re.sub(r'\[([^]]*)\]\([^)]*\)|[*`$"]', r'\1', heading)
            c['metadata'] = dict(c['metadata'], mystnb=dict(image=dict(alt=f'Figure: {text}')))

def copy_notebook(path):
    "Write the site's copy of a notebook"
    nb = keeper.read(path)
    nb['cells'] = [shown for c in nb['cells'] if (shown := show_cell(c))]
    describe_images(nb)
    for c in nb['cells']: # nbs/index.ipynb is the README, the site's first page
        if c['cell_type'] == 'markdown': c['source'] = re.sub(r'\]\(((?:\.\./)*)index\.ipynb', r'](../\1index.md', c['source'])
    nb['metadata'] = dict(kernelspec=dict(name='python3', language='python', display_name='python3'), language_info=dict(name='python'))
    target = SOURCE/path.relative_to(ROOT)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(nb), encoding='utf-8')

def title_of(path): return keeper.source(keeper.read(path)['cells'][0]).splitlines()[0].removeprefix('# ')

# -- API ------------------------------------------------------------------------------------------------------------

def type_name(annotation):
    if annotation is inspect.Parameter.empty: return ''
    name = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r'\b(numpy|torch|pathlib|typing|collections\.abc)\.', '', name).replace('|', r'\|')

def without_address(text): return re.sub(r' at 0x[0-9a-f]+', '', text)

def default_of(parameter):
    if parameter.default is inspect.Parameter.empty: return ''
    text = without_address(repr(parameter.default))
    return '`' + (text if len(text) < 60 else text[:57] + '...').replace('|', r'\|').replace(str(ROOT), '') + '`'

def clean(text): return ' '.join(str(text or '').split()).replace('|', r'\|').replace('<', r'\<')

def parameter_table(f):
    "A Markdown table of a function's parameters, from their docments"
    from fastcore.docments import docments
    try: told, parameters = docments(f, full=True), inspect.signature(f).parameters
    except (TypeError, ValueError, AttributeError, SyntaxError, OSError): return ''
    rows = [(p.name, type_name(p.annotation), default_of(p), clean((told.get(p.name) or {}).get('docment')))
            for p in parameters.values() if p.name not in ('self', 'cls')]
    out = told.get('return') or {}
    lines = [f"| `{'**' if parameters[n].kind is inspect.Parameter.VAR_KEYWORD else ''}{n}` | {t and f'`{t}`'} | {d} | {m} |" for n, t, d, m in rows]
    anno = type_name(out.get('anno', inspect.Parameter.empty))
    if out.get('docment') or anno: lines.append(f"| *returns* | {anno and f'`{anno}`'} | | {clean(out.get('docment'))} |")
    return '\n'.join(['| | type | default | |', '|---|---|---|---|', *lines]) if lines else ''

def field_table(cls):
    "A Markdown table of a dataclass's fields"
    comments = dict(re.findall(r'^ +(\w+)\s*:[^#\n]*#\s*(.*)$', inspect.getsource(cls), re.M))
    lines = [f"| `{f.name}` | `{type_name(f.type)}` | {clean(comments.get(f.name))} |" for f in dataclasses.fields(cls)]
    return '\n'.join(['| field | type | |', '|---|---|---|', *lines])

def describe(name, obj, level, label):
    "A public name as Markdown"
    out = [f'({label})=', f"{'#'*level} {name}", clean(inspect.getdoc(obj)) if inspect.isclass(obj) or callable(obj) else '']
    if inspect.isclass(obj):
        if dataclasses.is_dataclass(obj): out.append(field_table(obj))
        own = [c for c in reversed(obj.__mro__) if c is obj or c.__name__[0]=='_' and c.__module__.startswith('deepfid')] # private bases have no page of their own
        members = {key: member for c in own for key, member in vars(c).items()}
        if not dataclasses.is_dataclass(obj) and '__init__' in members: out.append(parameter_table(obj.__init__))
        for key, member in members.items():
            if isinstance(member, (classmethod, staticmethod)): member = member.__func__
            if key[0] != '_' and inspect.isfunction(member) and inspect.getdoc(member):
                out += [f'**`{name}.{key}`** — {clean(inspect.getdoc(member))}', parameter_table(member)]
    elif callable(obj): out.append(parameter_table(obj))
    else: out.append('`' + clean(without_address(repr(obj)))[:160].replace('`', "'").replace(str(ROOT), '') + '`')
    return '\n\n'.join(o for o in out if o)

def api_page(module, notebook):
    "The page of a module: every public name with its docstring and docments"
    lines = [f'# deepfid.{module.__name__.removeprefix("deepfid.")}', clean(module.__doc__), f'Written in [{notebook.name}](../{notebook.relative_to(ROOT).as_posix()}).']
    seen = set() # labels do not tell `Xception` from `xception`
    for name in module.__all__:
        label = f'api-{module.__name__}.{name}'.lower()
        lines.append(describe(name, getattr(module, name), 2, label + '-function'*(label in seen)))
        seen.add(label)
    return '\n\n'.join(lines) + '\n'

def notebook_of(path):
    "The notebook that wrote a module"
    return (path.parent/re.search(r'File to edit: (\S+)\.$', path.read_text(encoding='utf-8'), re.M)[1]).resolve()

def write_api():
    "Write the API pages; returns their names"
    import deepfid
    (SOURCE/'api').mkdir(parents=True)
    names = []
    for m in pkgutil.walk_packages(deepfid.__path__, 'deepfid.'):
        module = import_module(m.name)
        if m.ispkg or not hasattr(module, '__all__'): continue
        names.append(m.name.removeprefix('deepfid.'))
        (SOURCE/f'api/{names[-1]}.md').write_text(api_page(module, notebook_of(Path(module.__file__))), encoding='utf-8')
    return names

# -- pages ----------------------------------------------------------------------------------------------------------

def toctree(caption, entries): return '\n'.join(['```{toctree}', ':hidden:', f':caption: {caption}', ':maxdepth: 1', '', *entries, '```', ''])

def sidebar(paths):
    "The captions of the sidebar and the pages below them, in their order, which is also that of *previous* and *next*"
    stops = ['nbs/' + n.removesuffix('.ipynb') for n in keeper.PATH]
    def shelf(folder): return [n for p in paths if p.parent.name == folder and (n := p.relative_to(ROOT).with_suffix('').as_posix()) not in stops]
    lessons = [n for n in shelf('nbs') if re.match(r'nbs/\d\d_', n)]
    return {'Reading path': stops, 'More lessons': lessons, 'More tutorials': shelf('tutorials'), 'Library': shelf('lib'),
            'Reference': [*[n for n in shelf('nbs') if n not in lessons], 'api/index'], 'Project': ['CONTRIBUTING', 'CHANGELOG']}

def write_sources():
    "Gather everything that the site shows below out/site-source"
    shutil.rmtree(SOURCE, ignore_errors=True)
    paths = [p for p in keeper.notebooks() if p.name != 'index.ipynb']
    for p in paths: copy_notebook(p)
    for folder in ('nbs/images', 'nbs/results'):
        if (ROOT/folder).is_dir(): shutil.copytree(ROOT/folder, SOURCE/folder)
    for name in ('CONTRIBUTING.md', 'CHANGELOG.md', 'LICENSE', 'CITATION.cff', 'constraints.txt'):
        if not (ROOT/name).is_file(): continue
        text = (ROOT/name).read_text(encoding='utf-8')
        (SOURCE/name).write_text(text.replace('(README.md', '(index.md'), encoding='utf-8') # the README is the site's first page
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    stops = {'nbs/' + n.removesuffix('.ipynb'): f'{i}. {title}' for i, (n, title) in enumerate(keeper.PATH.items(), 1)}
    titled = lambda n: f'{stops[n]} <{n}>' if n in stops else n
    trees = [toctree(caption, map(titled, entries)) for caption, entries in sidebar(paths).items()]
    (SOURCE/'index.md').write_text(text + '\n\n' + '\n'.join(trees), encoding='utf-8')
    (SOURCE/'_static').mkdir()
    (SOURCE/'_static/deepfid.css').write_text(CSS, encoding='utf-8')
    names = write_api()
    tree = '\n'.join(['```{toctree}', ':maxdepth: 1', '', *names, '```'])
    (SOURCE/'api/index.md').write_text(f'# API\n\nEvery public name, with its docstring and the meaning of its parameters.\n\n{tree}\n', encoding='utf-8')

def mathml(latex, display):
    from latex2mathml.converter import convert
    return convert(latex, display='block' if display else 'inline')

def setup(app):
    "Sphinx extension: maths as MathML, which browsers draw without a script"
    def visit_inline(self, node):
        from docutils import nodes
        self.body.append(mathml(node.astext(), False))
        raise nodes.SkipNode
    def visit_block(self, node):
        from docutils import nodes
        self.body.append(f'<div class="math">{mathml(node.astext(), True)}</div>')
        raise nodes.SkipNode
    app.add_css_file('deepfid.css')
    app.add_html_math_renderer('mathml', (visit_inline, None), (visit_block, None))
    return dict(parallel_read_safe=True, parallel_write_safe=True)

def settings():
    import deepfid
    return dict(project='deepfid', author='The deepfid authors', copyright='The deepfid authors, Apache-2.0', version=deepfid.__version__, release=deepfid.__version__,
        extensions=['myst_nb', 'docs_site'], html_theme='furo', html_title=f'deepfid {deepfid.__version__}', html_math_renderer='mathml',
        nb_execution_mode='off', nb_ipywidgets_js={}, nb_merge_streams=True, nb_render_markdown_format='myst', myst_enable_extensions=['dollarmath', 'html_image'],
        myst_heading_anchors=3, html_copy_source=False, html_static_path=['_static'], html_show_sourcelink=False, exclude_patterns=['nbs/results/**'],
        suppress_warnings=['mystnb.unknown_mime_type', 'misc.highlighting_failure', 'myst.header'],
        html_theme_options=dict(top_of_page_buttons=[]))

FOREIGN = re.compile(r'<(?:script|img|link|iframe|source|video|audio)\b[^>]*?\b(?:src|href)="(?:https?:)?//[^"]*"|url\(["\']?https?:|@import\s+["\']?https?:')

def foreign(folder):
    "Everything in a built site for which a page would ask another host"
    for p in sorted(folder.rglob('*')):
        if p.suffix not in ('.html', '.css'): continue
        for m in FOREIGN.finditer(p.read_text(encoding='utf-8', errors='replace')):
            if 'rel="canonical"' not in m[0]: yield f'{p.relative_to(folder)}: {m[0][:120]}'

def build():
    "Build the site; returns Sphinx's status, 0 if all is well"
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace, patch_docutils
    write_sources()
    shutil.rmtree(SITE, ignore_errors=True)
    with patch_docutils(), docutils_namespace():
        app = Sphinx(SOURCE, None, SITE, ROOT/'out/site-doctrees', 'html', settings(), warning=sys.stderr, status=None, freshenv=True,
                     warningiserror=True, keep_going=True, parallel=2)
        app.build(force_all=True)
    return app.statuscode

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='fail where a page asks another host for anything')
    args = parser.parse_args()
    status = build()
    found = list(foreign(SITE)) if args.check else []
    print('\n'.join(found) or f'{len(list(SITE.rglob("*.html")))} pages in {SITE.relative_to(ROOT)}')
    sys.exit(bool(status or found))
