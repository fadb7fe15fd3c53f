"The live trainings of the lessons: the line that each of them stores, and one short training"
import json, re
from pathlib import Path
import pytest
from deepfid.data.london import london_people
from deepfid.experiments.live import LIVE_METHODS, LIVE_SETTINGS, LiveCurve, live_pairs, train_live
from deepfid.models.local_similarity.detector import LocalSimilarity

NBS = Path(__file__).resolve().parents[1]/'nbs'
LESSONS = ('tutorials/first_look', '20_ssaa', '23_deepfidelity', '31_llsm', '32_local_similarity', '40_ocr_transformer', '41_lisiam')
MAX_SECONDS = 96 # of one thread, as stored; two cores take a minute for that
LINE = re.compile(r'live: AUC (\d\.\d\d) \[(\d\.\d\d), (\d\.\d\d)\], (\d+) s')

def live_cell(name):
    "The cell of a lesson in which a detector is trained live: its source and what it printed"
    cells = json.loads((NBS/f'{name}.ipynb').read_text(encoding='utf-8'))['cells']
    [cell] = [c for c in cells if c['cell_type'] == 'code' and 'live = train_live(' in ''.join(c['source'])]
    return ''.join(cell['source']), ''.join(''.join(o.get('text', '')) for o in cell['outputs'])

@pytest.mark.parametrize('name', LESSONS)
def test_lesson_learns_within_a_minute(name):
    source, printed = live_cell(name)
    auc, low, high, seconds = map(float, LINE.fullmatch(printed.strip().splitlines()[-1]).groups())
    assert auc >= .85 and .75 < low <= auc <= high and seconds <= MAX_SECONDS
    assert '**LIVE_SETTINGS' in source and 'assert live.auc.low>.75' in source # a test of the notebook holds it

def test_nobody_is_in_two_splits():
    pairs = live_pairs((12, 4, 4))
    for split in ('train', 'valid', 'test'): assert set(pairs.of(split).table['identity']) <= london_people(split)
    assert set(pairs.table['method']) == {'real', *LIVE_METHODS} and pairs is live_pairs((12, 4, 4))

def test_short_training_says_what_it_learned(capsys):
    settings = LIVE_SETTINGS|dict(size=80, steps=20, epochs=2)
    live = train_live(LocalSimilarity(backbone='efficientnet_lite0', use_llsm=False, use_flm=False, **settings),
        live_pairs((160, 10, 40)))
    printed = capsys.readouterr().out
    assert printed == f'{live}\n' and LINE.fullmatch(printed.strip()) # no bar, no curve, where nobody looks
    assert live.auc.low > .5 and len(live.rows) == 2 and len(live.fidelity) == 80
    assert live.compare(live)['difference'] == dict(value=0, low=0, high=0)
    assert live.test.table['method'].iloc[live.examples()].iloc[0] == 'real'

def test_curve_is_redrawn_where_somebody_looks(monkeypatch):
    shown = []
    class Handle:
        def update(self, figure): shown.append(('again', figure))
    def display(figure, display_id=None):
        shown.append((display_id, figure))
        return Handle() if display_id else None
    monkeypatch.setattr('IPython.display.display', display)
    row = dict(epoch=1, train_loss=.7, valid_loss=.7, auc=.6, auc_low=.5, auc_high=.7)
    curve = LiveCurve(None, live=True)
    for _ in range(2):
        curve.rows.append(row)
        curve.print_row(2)
    assert [how for how, _ in shown] == [True, 'again']
    quiet = LiveCurve(None, live=False)
    quiet.rows.append(row)
    quiet.print_row(1)
    assert len(shown) == 2
