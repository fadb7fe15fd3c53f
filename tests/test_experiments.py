"Conditions of the experiments: manifests by compression, forger, corruption and mask source; masks and videos in tables"
import subprocess
import sys
import time
import numpy as np
import pytest
from deepfid.core import Detector, Prediction
from deepfid.data.manifest import Manifest
from deepfid.experiments import conditions
from deepfid.experiments.deepfidelity import in_quality_range
from deepfid.experiments.local_similarity import EvidenceDetector
from deepfid.evaluate.metrics import score_face_mask
from deepfid.experiments.runner import Column, Row, Table, TableRun, transfer_columns
from deepfid.models.local_similarity.detector import LocalSimilarity
from deepfid.testing import tiny_manifest

@pytest.fixture(scope='module')
def faces(): return tiny_manifest((16, 8, 10), 64)

class LeftHalfDetector(Detector):
    "Marks the left half of every face"
    name, threshold = 'test_left_half', .5
    def __init__(self, seed=0, masks=True): self.masks = masks
    def fit(self, manifest, preset=None, recipe=None, cbs=None): return self
    def predict(self, faces, batch_size=32):
        mask = np.tile(np.repeat([1., 0.], 32), (64, 1)) if self.masks else None
        return [Prediction(f.mean()/255, mask) for f in faces]

def run(manifest, cache, rows, metrics, seeds=1):
    table = Table('t', 't', rows, lambda names: [Column('x', 'x', 'x', metrics=metrics)])
    r = TableRun(table, {'x': manifest}, seeds, 'tiny', cache, lambda line: None, probes=False).run()
    return {(f['row'], f['metric']): f for f in r.results(50)}

def test_mask_scores():
    true = np.zeros((8, 8)); true[:4] = 1
    found = score_face_mask(true, true, true)
    assert (found['iou'], found['f1'], found['boundary_f1'], found['iou_gain'])==(1, 1, 1, 0)
    assert 'iou' not in score_face_mask(true, np.zeros((8, 8))) and score_face_mask(1-true, true)['iou']==0
    assert score_face_mask(np.kron(true, np.ones((2, 2))), true)['iou']==1

def test_masks_in_a_table(faces, tmp_path):
    rows = [Row('with', LeftHalfDetector), Row('without', LeftHalfDetector, dict(masks=False))]
    found = run(faces, tmp_path, rows, ('auc', 'iou', 'iou_gain'), 2)
    fakes = faces.of('test').where(label=0)
    masks = [p.mask for p in LeftHalfDetector().predict_manifest(fakes)]
    expected = np.mean([score_face_mask(m, fakes.mask(i))['iou'] for i, m in enumerate(masks)])
    assert found['with', 'iou']['value']==pytest.approx(expected) and found['with', 'iou']['faces']==len(fakes)
    assert found['with', 'iou_gain']['value']<found['with', 'iou']['value']
    assert found['without', 'iou']['value'] is None and found['without', 'auc']['value'] is not None

def test_videos_in_a_table(tmp_path):
    m = conditions.synthetic_video_set(tmp_path/'m', (2, 2, 2), frames=3, size=64)
    t = m.of('test').table
    assert len(t)==12 and set(t['frame'])=={0, 1, 2}
    metrics = ('video_auc', 'video_accuracy', 'video_auc_majority', 'video_auc_window')
    found = run(m, tmp_path/'c', [Row('k', LeftHalfDetector)], metrics)
    assert all(r['value'] is not None for r in found.values())

def test_single_forgers_in_pairs_and_with_shared_real_faces(faces):
    parts = conditions.forger_manifests({'x': faces})
    for name, m in parts.items():
        assert set(m.table['method'])=={'real', name.split(', ')[1]} and m.table['label'].mean()==.5
    assert len(transfer_columns(['x', *parts]))==len(parts)**2
    t = faces.table.assign(pair=faces.table['identity']) # one real face has the fakes of all forgers
    t.loc[t.index[:2], 'pair'] = ''
    for name, m in conditions.forger_manifests({'x': Manifest(t, faces.folder, 'shared')}).items():
        fakes, reals = m.table[m.table['label']==0], m.table[m.table['label']==1]
        assert len(fakes)==(t['method']==name.split(', ')[1]).sum() and set(reals['pair'])<=set(fakes['pair'])

def test_compression_levels(faces, tmp_path):
    one = faces.where(split='test', pair=faces.of('test').table['pair'].iloc[0])
    levels = conditions.compressed_manifests({'x': one}, tmp_path)
    lost = [np.abs(m.image(0).astype(int)-one.image(0)).mean() for m in levels.values()]
    assert lost[0]==0<lost[1]<lost[2] and len(transfer_columns(['x', *levels]))==9

CORRUPTIONS = conditions.QUALITY_CORRUPTIONS|conditions.SEEN_CORRUPTIONS|conditions.UNSEEN_CORRUPTIONS
@pytest.mark.parametrize('name', list(CORRUPTIONS))
def test_corruptions_keep_the_size_and_are_repeatable(name, faces):
    im, corrupt = faces.image(0), CORRUPTIONS[name]
    out = corrupt(im)
    assert out.shape==im.shape and out.dtype==np.uint8 and not np.array_equal(out, im)
    assert np.array_equal(out, corrupt(im))

def test_evidence_of_several_outputs(faces):
    similarity = LocalSimilarity(epochs=1, size=64).fit(faces, 'tiny')
    detector = EvidenceDetector(similarity, [0, 1, 2, 3]).fit(faces)
    predictions = detector.predict_manifest(faces.of('test'))
    assert all(0<=p.fidelity<=1 and p.mask is not None for p in predictions)

def test_quality_ranges_need_a_quality(faces):
    with pytest.raises(Exception, match='no quality'):
        in_quality_range(faces.table.assign(quality=np.nan), 1, 0, 'width')

def test_unknown_tables_and_figures_are_refused_without_importing_torch():
    code = '''if True:
        import sys
        from deepfid.core import DeepfidError
        from deepfid.experiments.registry import get_figure, get_table, list_figures, list_tables
        assert len(list_tables())>=26 and len(list_figures())>=7
        for get in (get_table, get_figure):
            try: get('beauty')
            except DeepfidError as e: assert "'beauty': there are" in str(e)
            else: raise SystemExit('not refused')
        assert not {'torch', 'sklearn', 'pandas'}&set(sys.modules), 'heavy imports'
    '''
    start = time.time()
    subprocess.run([sys.executable, '-c', code], check=True)
    assert time.time()-start<10 # a second on an idle machine
