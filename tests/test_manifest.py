"Manifests and their checks, pairs forged in parallel, data loaders"
import filecmp, os, shutil
import cv2, numpy as np, pandas as pd, pytest, torch
from deepfid.core import DeepfidError, ManifestError
from deepfid.data.loaders import FaceDataset, dataloaders
from deepfid.data import manifest
from deepfid.data.manifest import Manifest, csv_text, equal_files, person_key, read_manifest_csv, split_identities
from deepfid.data.pairs import build_pairs, synthetic_sources

@pytest.fixture(scope='module')
def built(tmp_path_factory): return build_pairs(synthetic_sources(20, 2, seed=77), tmp_path_factory.mktemp('m')/'set', pairs=(20, 4, 6), workers=1, quality=np.mean)

def edited_file(built, tmp_path, change):
    "The manifest's file with its table edited, beside links to its images"
    table = change(pd.read_csv(built.folder/'manifest.csv', keep_default_na=False))
    for sub in ('faces', 'masks'): (tmp_path/sub).symlink_to(built.folder/sub)
    table.to_csv(tmp_path/'manifest.csv', index=False)
    return tmp_path/'manifest.csv'

def set_cell(column, row, value):
    def change(t):
        t[column] = t[column].astype(object)
        t.loc[row, column] = value
        return t
    return change

@pytest.mark.parametrize('change, message', [
    (lambda t: t.drop(columns='label'), "no column 'label'"),
    (set_cell('label', 3, 'maybe'), "label 'maybe'"),
    (set_cell('label', 3, 2), "label '2'"),
    (lambda t: t.assign(path=t['path'].where(t.index!=5, t['path'][4])), 'same path'),
    (set_cell('split', 0, 'holdout'), "split 'holdout'"),
    (lambda t: t.assign(split=t['split'].where(t['pair']!=t['pair'][0], 'test')), 'identity'),
    (set_cell('path', 2, 'faces/gone.jpg'), 'gone.jpg'),
    (set_cell('quality', 1, 'good'), "quality 'good'"),
    (lambda t: t[:0], 'no rows'),
], ids=['missing column', 'unknown label', 'label 2', 'duplicate path', 'unknown split', 'identity in two splits', 'missing image', 'quality as text', 'empty'])
def test_a_bad_manifest_is_refused_in_one_line(built, tmp_path, change, message):
    with pytest.raises(ManifestError, match=message) as e: Manifest.read(edited_file(built, tmp_path, change))
    assert '\n' not in str(e.value) and 'manifest.csv' in str(e.value)

def test_missing_and_binary_files(tmp_path):
    with pytest.raises(ManifestError, match='no such manifest'): Manifest.read(tmp_path/'x.csv')
    (tmp_path/'x.csv').write_bytes(b'\x00\x01\x02')
    with pytest.raises(ManifestError): Manifest.read(tmp_path/'x.csv')

# -- leaks ------------------------------------------------------------------------------------------------------------

def image_rows(folder, *rows, **columns):
    "A manifest of small images, all different: (path, identity, split)"
    for k, (path, *_) in enumerate(rows):
        (p := folder/path).parent.mkdir(parents=True, exist_ok=True)
        p.write_bytes(cv2.imencode('.png', np.random.default_rng(k).integers(0, 256, (16, 16, 3), np.uint8))[1].tobytes())
    return Manifest(pd.DataFrame([dict(path=p, identity=i, split=s, label=1) for p, i, s in rows]).assign(**columns), folder)

@pytest.mark.parametrize('one, other', [('p010', 'P010'), ('p010', ' p010 '), ('Zo\u00e9', 'Zoe\u0301'), ('stra\u00dfe', 'STRASSE'),
    ('p010', '\uff50\uff10\uff11\uff10'), ('p010', 'p010\u200b'), ('ann lee', 'ann  lee'), ('ann lee', 'Ann\u00a0Lee')])
@pytest.mark.parametrize('datasets', [('', ''), ('a', 'b')])
def test_one_person_in_two_splits_however_written(tmp_path, one, other, datasets):
    m = image_rows(tmp_path, ('1.png', one, 'train'), ('2.png', other, 'test'), dataset=datasets)
    with pytest.raises(ManifestError, match='the same person is in another split too') as e: m.check()
    assert '\n' not in str(e.value) and '2.png' in str(e.value)
    image_rows(tmp_path, ('1.png', one, 'train'), ('2.png', other, 'train'), dataset=datasets).check()
    donor = image_rows(tmp_path, ('1.png', 'x', 'train'), ('2.png', other, 'test'), donor=[one, ''], dataset=datasets)
    with pytest.raises(ManifestError, match='the same person'): donor.check()
    assert split_identities([one, other, *'abcdefgh'])[one]==split_identities([one, other, *'abcdefgh'])[other]

@pytest.mark.parametrize('other', ['faces/./1.png', 'faces//1.png', 'faces/../faces/1.png'])
def test_one_path_in_two_spellings(tmp_path, other):
    m = image_rows(tmp_path, ('faces/1.png', 'a', 'train'), (other, 'b', 'test'), dataset=['x', 'y'])
    with pytest.raises(ManifestError, match='same path'): m.check(files=False)

def test_copied_images_are_refused_across_splits_and_reported_within(tmp_path, monkeypatch):
    rows = [('1.png', 'a', 'train'), ('2.png', 'b', 'train'), ('3.png', 'c', 'test'), ('4.png', 'd', 'test')]
    hashed, file_hash = [], manifest.file_hash
    monkeypatch.setattr(manifest, 'file_hash', lambda p: hashed.append(p) or file_hash(p))
    m = image_rows(tmp_path, *rows, dataset=['w', 'x', 'y', 'z'])
    assert m.check().notes==[] and not hashed # images that cannot be equal are not hashed
    os.link(tmp_path/'1.png', tmp_path/'5.png')
    within = Manifest(pd.concat([m.table, m.table[:1].assign(path='5.png')]), tmp_path)
    assert within.check().notes==['images that are copies of another one in the same split: 1'] and 'are copies' in repr(within) and len(hashed)==2
    (tmp_path/'4.png').write_bytes((tmp_path/'2.png').read_bytes())
    with pytest.raises(ManifestError, match="'2.png' in 'train' is a copy of '4.png' in 'test'"): m.check()
    (tmp_path/'4.png').unlink()
    (tmp_path/'4.png').symlink_to(tmp_path/'2.png')
    with pytest.raises(ManifestError, match='is a copy of'): m.check()
    assert m.check(files=False)

def test_equal_files(tmp_path):
    for name, content in dict(a=b'x'*3000, b=b'y'+b'x'*2999, c=b'x'*3000, d=b'x', e=b'', f=b'').items(): (tmp_path/name).write_bytes(content)
    assert equal_files(tmp_path/n for n in 'abcdef')==[[0, 2], [4, 5]]

# -- messages that name the cause -------------------------------------------------------------------------------------

CSV = 'path,label,identity,split\nfaces/a.png,1,p,test\n'

@pytest.mark.parametrize('change, message', [
    (lambda t: t.replace(',', ';'), 'separated by semicolons; save it with commas'),
    (lambda t: t.replace(',', '\t'), 'separated by tabs'),
    (lambda t: t.replace('label,', 'label,label,').replace('1,p', '1,0,p'), "has two columns 'label'; rename or remove one"),
    (lambda t: t.replace('path', 'Path'), "no column 'path', but 'Path'; rename it"),
    (lambda t: t.replace(',', ', '), "no column 'label', but ' label'; remove the spaces"),
    (lambda t: t.replace('split', 'split,Donor').replace('test', 'test,q'), "no column 'donor', but 'Donor'"),
    (lambda t: t.replace('test', ' test'), "has split ' test'; remove the spaces"),
    (lambda t: t.replace('faces/', 'faces\\'), 'has backslashes; write /'),
    (lambda t: t.replace('faces/', ' faces/'), 'has spaces around it'),
    (lambda t: t.replace('faces/', 'https://example.org/'), 'https://example.org/a.png; is an address; download'),
    (lambda t: t.replace('label', 'is_real'), "no column 'label'; a manifest needs path, label, identity, split"),
    (lambda t: t.replace('p,test', 'J\u00fcrgen,test').encode('cp1252'), 'is not UTF-8 text'),
    (lambda t: t.replace('p,test', 'p,test,and,more'), 'rows have more cells than its first line'),
    (lambda t: t.encode('utf-16'), 'is not UTF-8 text')])
def test_the_cause_is_named(tmp_path, change, message):
    image_rows(tmp_path, ('faces/a.png', 'p', 'test'))
    content = change(CSV)
    (tmp_path/'m.csv').write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ManifestError, match=message.replace('\\', '.')) as e: Manifest.read(tmp_path/'m.csv')
    assert '\n' not in str(e.value) and 'm.csv' in str(e.value)

def test_what_the_system_refuses_is_named(tmp_path, monkeypatch):
    image_rows(tmp_path, ('faces/a.png', 'p', 'test'))
    (tmp_path/'m.csv').write_text(CSV)
    assert len(Manifest.read(tmp_path/'m.csv'))==1
    with pytest.raises(ManifestError, match='is a folder'): Manifest.read(tmp_path)
    def refuse(path, *a, **k):
        if str(path).endswith('a.png'): raise PermissionError(13, 'Permission denied', str(path))
        return stat(path, *a, **k)
    stat = os.stat
    monkeypatch.setattr(os, 'stat', refuse)
    with pytest.raises(ManifestError, match='faces/a.png: cannot be read .Permission denied.'): Manifest.read(tmp_path/'m.csv')

# -- batches ----------------------------------------------------------------------------------------------------------

def test_nan_quality_is_refused_only_for_fidelity(built):
    table = built.table.assign(quality=np.nan)
    dataloaders(Manifest(table, built.folder), bs=8)
    with pytest.raises(ManifestError, match='quality'): dataloaders(Manifest(table, built.folder), 'fidelity', bs=8, targets=lambda q, r: q)

def test_splits_do_not_depend_on_order():
    names = [f'p{i}' for i in range(50)]
    a = split_identities(names, seed=3)
    assert a==split_identities(names[::-1]*2, seed=3)!=split_identities(names, seed=4)
    assert {s: list(a.values()).count(s) for s in ('train', 'valid', 'test')}==dict(train=35, valid=5, test=10)

def test_pairs_are_complete_and_disjoint(built):
    t = built.table
    assert len(t)==60 and (t.groupby('pair')['label'].agg(['sum', 'size'])==[1, 2]).all().all()
    assert t.groupby('identity')['split'].nunique().max()==1
    donors = t[t['donor']!='']
    split_of = t.groupby('identity')['split'].first()
    assert (donors['donor']!=donors['identity']).all() and all(split_of.get(d, s)==s for d, s in zip(donors['donor'], donors['split']))
    assert set(t['method'])=={'real', 'swap', 'resynth', 'reenact', 'mouth', 'selfblend'} and t['quality'].notna().all()

def test_masks_show_where_real_and_fake_differ(built):
    for i in range(0, 20, 2):
        j = i+1
        assert built.table['pair'][i]==built.table['pair'][j]
        d = np.abs(built.image(i).astype(int)-built.image(j)).mean(-1)
        m = built.mask(j)
        assert built.mask(i).max()==0 and d[m>.5].mean()>3*d[cv2.dilate(m, np.ones((17, 17)))==0].mean()

def test_names_with_a_carriage_return_are_read_back(tmp_path):
    table = pd.DataFrame(dict(path=['a\r.png', 'b.png', 'c\r\n.png', 'd"\r.png'], note=['', 'x\ry', 'z', '1,2']))
    (tmp_path/'t.csv').write_bytes(csv_text(table).encode())
    read = read_manifest_csv(tmp_path/'t.csv')
    assert read['path'].tolist()==table['path'].tolist() and read['note'].tolist()==table['note'].tolist()

def test_a_number_of_a_person_is_one_name_however_a_spreadsheet_writes_it():
    assert person_key('10')==person_key('10.0')==person_key(' 10.00') and len({person_key(n) for n in ('10', '1', 'v1.0', '10.5', '100')})==5

def test_the_same_whatever_the_number_of_workers(tmp_path):
    a, b = (build_pairs(synthetic_sources(15, 2, seed=5), tmp_path/str(w), pairs=(8, 2, 2), size=64, workers=w) for w in (1, 2))
    assert (tmp_path/'1'/'manifest.csv').read_bytes()==(tmp_path/'2'/'manifest.csv').read_bytes()
    names = [*a.table['path'], *a.table['mask'][a.table['mask']!='']]
    assert filecmp.cmpfiles(tmp_path/'1', tmp_path/'2', names, shallow=False)[0]==names

def test_nothing_half_written_when_a_source_fails(tmp_path):
    class Broken:
        identity, dataset, consent, landmarks = 'x', 'd', True, True
        def __init__(self, i): self.identity = f'x{i}'
        def load(self, size): raise RuntimeError('no such camera')
    with pytest.raises(RuntimeError): build_pairs([Broken(i) for i in range(10)], tmp_path/'set', pairs=(4, 1, 1), workers=1)
    assert list(tmp_path.iterdir())==[]

def test_batches_are_balanced_pairs_moved_alike(built):
    dls = dataloaders(built, 'label+mask', bs=8, pairs_together=True)
    for x, (y, mask) in dls.train:
        assert x.shape[1:]==(3, 112, 112) and -1<=x.min() and x.max()<=1 and mask.shape==(len(x), 1, 112, 112)
        assert (y==torch.tensor([1, 0]*(len(y)//2))).all() and mask[::2].max()==0
        far = torch.nn.functional.max_pool2d(mask[1::2], 17, 1, 8)==0
        difference = (x[::2]-x[1::2]).abs().mean(1, keepdim=True)
        assert difference[far].mean()<.5*difference[mask[1::2]>.5].mean()

def test_validation_is_in_order_and_untouched(built):
    dls, valid = dataloaders(built, bs=8), built.of('valid')
    x = torch.cat([x for x, _ in dls.valid])
    np.testing.assert_allclose(x[3].permute(1, 2, 0).numpy(), valid.image(3)/127.5-1, atol=1e-5)
    assert torch.cat([y for _, y in dls.valid]).tolist()==valid.table['label'].tolist()

def test_enlarged_masks_do_not_wrap_around(tmp_path):
    "Cubic enlargement overshoots 1; as a byte that would become 0"
    rng, mask = np.random.default_rng(0), np.zeros((40, 40), np.uint8)
    mask[10:30, 10:30] = 255
    for name, im in (('r.png', rng.integers(0, 255, (40, 40, 3))), ('f.png', rng.integers(0, 255, (40, 40, 3))), ('m.png', mask)): cv2.imwrite(str(tmp_path/name), im.astype(np.uint8))
    rows = [dict(path='r.png', label=1, identity='a', split='train', pair='1', mask=''), dict(path='f.png', label=0, identity='a', split='train', pair='1', mask='m.png')]
    got = FaceDataset(Manifest(pd.DataFrame(rows), tmp_path), 'label+mask', 56).decode([1])[0, 3].numpy().astype(int)
    assert got[20:36, 20:36].min()==255 and got[:10].max()==0 and np.abs(np.diff(got[28])).max()<=255 and (got[28, 16:40]>200).all()

@pytest.mark.parametrize('cell', ['1_000', 'much', '0x10'])
def test_quality_that_is_no_plain_number_is_refused(built, cell):
    m = built
    table = m.table.astype({'quality': object})
    table.loc[2, 'quality'] = cell
    with pytest.raises(ManifestError, match=cell): Manifest(table, m.folder)

def test_key_keeps_the_last_digit(built):
    m = built
    table = m.table.assign(quality=-7.779709979665626+1e-15*np.arange(len(m)))
    assert Manifest(table, m.folder).table['quality'].tolist()==table['quality'].tolist()
    assert Manifest(table.astype({'quality': str}), m.folder).key()==Manifest(table, m.folder).key()

def test_key_hears_of_other_pixels_under_the_same_names(built, tmp_path):
    copied = shutil.copytree(built.folder, tmp_path/'copy')
    m = Manifest(built.table, copied)
    assert m.key()==built.key()
    for column in ('path', 'mask'):
        file = copied/next(name for name in m.table[column] if name)
        before, content = m.key(), file.read_bytes()
        file.write_bytes(content+b'x')
        assert m.key()!=before
        file.write_bytes(content)
        assert m.key()==before

@pytest.mark.parametrize('change, message', [
    (lambda mask: cv2.resize(mask, (64, 32)), 'a mask of 64x32 pixels for a face of 112x112'),
    (lambda mask: mask//255, 'its largest value is 1 of 255')])
def test_masks_that_do_not_fit(built, tmp_path, change, message):
    m = built.of('train')
    one = m.where(pair=m.table['pair'].iloc[0])
    name = one.table['mask'].max()
    for sub in ('faces', 'masks'): (tmp_path/sub).mkdir()
    for path in one.table['path']: (tmp_path/path).write_bytes((built.folder/path).read_bytes())
    cv2.imwrite(str(tmp_path/name), change(cv2.imread(str(built.folder/name), 0)))
    moved = Manifest(one.table, tmp_path)
    with pytest.raises(ManifestError, match=f'{name}: {message}'): FaceDataset(moved, 'label+mask').pixels(torch.arange(2))
    assert FaceDataset(Manifest(one.table, built.folder), 'label+mask').pixels(torch.arange(2)).shape==(2, 4, 112, 112)

def test_degraded_batches_follow_from_seed_and_epoch():
    "A resumed training sees the degradations of an uninterrupted one"
    from deepfid.data.degrade import Degrade
    from deepfid.data.loaders import dataloaders
    from deepfid.testing import tiny_manifest
    manifest = tiny_manifest((8, 4, 4), 64)
    def loader(): return dataloaders(manifest, size=64, bs=4, degrade=Degrade(1., seed=0), device='cpu').train
    first, again = loader(), loader()
    list(first.batches(0)) # an epoch before, which the other loader does not run
    for (a, _), (b, _) in zip(first.batches(1), again.batches(1)): assert (a==b).all()
    with pytest.raises(DeepfidError, match="part"): first.new(part=(0, 1))
