"The explorers in a person's hands: a real JupyterLab in a real browser, sliders dragged, positions clicked, a file dropped"
import os, re, shutil, signal, socket, subprocess, sys, time, urllib.request
from pathlib import Path
from importlib.util import find_spec
import pytest

if not find_spec('playwright'): pytest.skip('no Playwright', allow_module_level=True)

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')
if not CHROMIUM: pytest.skip('no Chromium on this machine', allow_module_level=True)
PATIENCE = 180_000 # milliseconds; a busy machine is no error
TOKEN = 'explorers'

START = '''
import numpy as np, torch
torch.set_num_threads(1)
from deepfid.core import Detector, Prediction
from deepfid.data.faces import align_face
from deepfid.data.synth import synthetic_face
from deepfid.explore.evaluation import EvaluationExplorer, MappingExplorer, quality_groups
from deepfid.explore.forgery import ForgeryExplorer
from deepfid.explore.maps import InvarianceExplorer, SimilarityExplorer, SSAAExplorer, layer_feature_maps
from deepfid.explore.score import ScoreExplorer
from deepfid.models.registry import get_detector_class
from deepfid.quality.niqe import load_niqe
faces = {f'synthetic {s}': align_face(synthetic_face(s), 112) for s in (11, 12)}
deepfidelity, similarity, lisiam = (get_detector_class(name)().configure('tiny') for name in ('deepfidelity', 'local_similarity', 'lisiam'))
niqe, rng, label = load_niqe('synth'), np.random.default_rng(0), np.arange(200)%2
quality = rng.uniform(-60, -5, 200)
class BrightnessDetector(Detector): # networks that were not trained predict the same mask for every face
    def predict(self, faces, batch_size=32): return [Prediction(f.mean()/255, f.mean(2)/255) for f in faces]
'''
CELLS = dict(
    score="ScoreExplorer({'DeepFidelity': deepfidelity, 'LocalSimilarity': similarity, 'LiSiam': lisiam}, faces, niqe)",
    forgery='ForgeryExplorer()', similarity='SimilarityExplorer(similarity, faces)',
    invariance="InvarianceExplorer({'LiSiam': lisiam, 'brightness': BrightnessDetector()}, faces)",
    mirror="SSAAExplorer(faces, dict(zip(faces, layer_feature_maps(deepfidelity.model, list(faces.values()), 'blocks1.0.attn'))))",
    evaluation="EvaluationExplorer(rng.normal(.35+.3*label, .25), label, .5, {'quality': quality_groups(quality)})",
    mapping='MappingExplorer(niqe, {k: f.image for k, f in faces.items()}, quality, label)')

SETTINGS = {'notebook-extension/tracker': '{"windowingMode": "none"}', 'apputils-extension/notification': '{"fetchNews": "false", "checkForUpdates": false}'}

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "Address of a JupyterLab that knows one notebook with every explorer"
    pytest.importorskip('jupyterlab')
    import nbformat
    home = tmp_path_factory.mktemp('lab')
    (home/'nbs').mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c.strip()) for c in (START, *CELLS.values())],
        metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python'))), home/'nbs/explorers.ipynb')
    for name, text in SETTINGS.items():
        path = home/f'settings/@jupyterlab/{name}.jupyterlab-settings'
        path.parent.mkdir(parents=True)
        path.write_text(text)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = os.environ | dict(JUPYTER_CONFIG_DIR=str(home/'config'), JUPYTER_RUNTIME_DIR=str(home/'runtime'), JUPYTERLAB_SETTINGS_DIR=str(home/'settings'),
        JUPYTERLAB_WORKSPACES_DIR=str(home/'workspaces'), IPYTHONDIR=str(home/'ipython'), PYTHONPATH=str(Path(__file__).resolve().parents[1]), OMP_NUM_THREADS='1')
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ServerApp.ip=127.0.0.1', f'--ServerApp.port={port}', '--ServerApp.port_retries=0',
        f'--IdentityProvider.token={TOKEN}', f'--ServerApp.root_dir={home/"nbs"}']
    with open(home/'log', 'w') as log: server = subprocess.Popen(command, stdout=log, stderr=log, env=env)
    try:
        yield _answering(f'http://127.0.0.1:{port}', server, home/'log')
    finally:
        server.send_signal(signal.SIGTERM) # stops its kernels too
        try: server.wait(30)
        except subprocess.TimeoutExpired: server.kill()

def _answering(address, server, log):
    "The address, once the server answers"
    for _ in range(PATIENCE//500):
        if server.poll() is not None: break
        try:
            urllib.request.urlopen(f'{address}/api/status?token={TOKEN}', timeout=5).close()
            return address
        except OSError: time.sleep(.5)
    pytest.fail(f'JupyterLab did not start: {log.read_text()[-2000:]}')

@pytest.fixture(scope='module')
def page(lab):
    "The notebook in the browser, all cells run"
    from playwright.sync_api import TimeoutError, expect, sync_playwright
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-gpu'])
        page = browser.new_page(viewport=dict(width=1400, height=1100))
        page.set_default_timeout(PATIENCE)
        page.goto(f'{lab}/lab/tree/explorers.ipynb?token={TOKEN}', wait_until='commit')
        try: _run_all_cells(page)
        except TimeoutError:
            errors = page.locator('.jp-OutputArea-output').all_inner_texts()
            pytest.fail(f'the notebook did not run: {errors or page.locator("body").inner_text()}')
        yield page
        browser.close()

def _run_all_cells(page):
    "As a person does: again, if the kernel was not there yet and nothing happened"
    from playwright.sync_api import TimeoutError
    first, last = page.locator('.jp-CodeCell').first, page.locator('.jp-CodeCell').nth(len(CELLS))
    last.wait_for()
    page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for()
    for _ in range(PATIENCE//5000):
        if first.locator('.jp-InputPrompt').first.inner_text()=='[ ]:':
            page.locator('.lm-MenuBar-itemLabel', has_text=re.compile('^Run$')).click()
            page.locator('.lm-Menu-itemLabel', has_text=re.compile('^Run All Cells$')).click()
        try: return last.locator('.jupyter-widgets').first.wait_for(timeout=5000)
        except TimeoutError: pass
    raise TimeoutError

class Hand:
    "What a person does with one explorer"
    def __init__(self, page, name, folder):
        self.page, self.name, self.folder = page, name, folder
        self.cell = page.locator('.jp-CodeCell').nth(1+list(CELLS).index(name)).locator('.jp-OutputArea')
        self.cell.scroll_into_view_if_needed()
        self.status = self.cell.locator('.widget-html-content').last
        self.status.wait_for()
        self.shoot('before')

    def control(self, label): return self.cell.locator('.jupyter-widgets').filter(has=self.page.locator(f'.widget-label:text-is("{label}")')).last
    def drag(self, label, share):
        "The slider's handle to a share of its way"
        control = self.control(label)
        handle, way = control.locator('.noUi-handle').first, control.locator('.noUi-base')
        handle.scroll_into_view_if_needed()
        a, b = handle.bounding_box(), way.bounding_box()
        self.page.mouse.move(a['x']+a['width']/2, a['y']+a['height']/2)
        self.page.mouse.down()
        self.page.mouse.move(b['x']+share*b['width'], b['y']+b['height']/2, steps=4)
        self.page.mouse.up()

    def changes(self, what, act):
        "Do something, and wait until something else has changed for it"
        from playwright.sync_api import expect
        if is_image := what!='status': target, before = self.cell.locator('img').nth(what), self.cell.locator('img').nth(what).get_attribute('src')
        else: target, before = self.status, self.status.inner_text()
        act()
        (expect(target).not_to_have_attribute('src', before) if is_image else expect(target).not_to_have_text(before))
        return self.status.inner_text()

    def shoot(self, when):
        self.page.wait_for_timeout(300) # until the image is painted
        self.cell.screenshot(path=self.folder/f'explorer-{self.name}-{when}.png')

@pytest.fixture
def hand(page, tmp_path):
    folder = Path(os.environ.get('DEEPFID_SCREENSHOTS', tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return lambda name: Hand(page, name, folder)

# -- one hand movement after the other ------------------------------------------------------------------------------

def test_nothing_went_wrong_on_the_page(page):
    assert not page.locator('[data-mime-type="application/vnd.jupyter.error"]').count()
    assert not page.get_by_text('Error displaying widget').count()

def test_score_follows_the_slider_and_refuses_a_text(hand, tmp_path):
    h = hand('score')
    assert 'DeepFidelity' in h.status.inner_text()
    h.changes(0, lambda: h.drag('JPEG', .05))
    h.shoot('after')
    (tmp_path/'notes.txt').write_text('hello')
    def drop():
        with h.page.expect_file_chooser() as chooser: h.cell.get_by_role('button', name='your photo').click()
        chooser.value.set_files(tmp_path/'notes.txt')
    assert 'notes.txt: is not an image' in h.changes('status', drop)
    h.shoot('refused')
    assert 'fidelity' in h.changes('status', lambda: h.drag('blur', .5))

def test_forgery_is_made_anew(hand):
    h = hand('forgery')
    before = h.changes(0, lambda: h.control('forger').locator('select').select_option('reenact'))
    assert 'DIFF' in h.changes('status', lambda: h.drag('strength', .95)) != before
    h.shoot('after')

def test_a_clicked_position_shows_its_row(hand):
    h = hand('similarity')
    def colours(): return h.cell.locator('.widget-gridbox button').evaluate_all('all => all.map(b => getComputedStyle(b).backgroundColor)')
    before, status = colours(), h.changes('status', lambda: h.cell.locator('.widget-gridbox button').nth(36).click())
    assert len(before) == 64 and status.startswith('row 5, column 5')
    h.changes('status', lambda: h.cell.get_by_role('button', name='true').click())
    h.changes(0, lambda: h.drag('x', .3))
    assert colours() != before and len(set(colours())) > 1
    h.shoot('after')

def test_one_copy_is_degraded(hand):
    h = hand('invariance')
    assert 'LiSiam: mean |difference| 0.000' in h.status.inner_text()
    assert 'brightness: mean |difference| 0.000' not in h.changes('status', lambda: h.drag('blur', .8))
    h.shoot('after')

def test_mirrored_weights_remove_the_asymmetry(hand):
    h = hand('mirror')
    assert 'of the mixture 0.000' in h.status.inner_text()
    assert 'of the mixture 0.000' not in h.changes('status', lambda: h.drag('w1', .95))
    h.shoot('after')

def test_the_threshold_is_dragged(hand):
    h = hand('evaluation')
    before = h.status.inner_text()
    assert re.search(r'accuracy 0\.\d+ here', before) and h.changes('status', lambda: h.drag('threshold', .9)) != before
    h.shoot('after')

def test_the_face_slides_along_the_mapping(hand):
    h = hand('mapping')
    h.changes('status', lambda: h.drag('JPEG', .1))
    h.changes('status', lambda: h.cell.get_by_role('button', name='rank').click())
    h.shoot('after')
