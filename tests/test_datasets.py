"Dataset readers: clips, consent, splits, downloads, and the errors for what is missing"
import contextlib, csv, functools, hashlib, http.server, os, threading
from collections import Counter, defaultdict
from dataclasses import replace
import cv2, numpy as np, pandas as pd, pytest
from deepfid.core import ConsentError, DataMissingError, DeepfidError, ManifestError, five_points
from deepfid.io import write_json
from deepfid.data import datasets
from deepfid.data.datasets import celebdf, congress, count_clips, describe_names, dfd, dfdcp, fetch_dataset, ffpp, clips_from_folder, landmarks68, london, london_info, member_identity, photograph_split, published_files, portraits, read_deepfakebench, read_clips, read_template, wilddeepfake, write_deepfakebench
from deepfid.io import iter_files
from deepfid.data.faces import find_face
from deepfid.data.forge import forge
from deepfid.data.london import london_split
from deepfid.data.manifest import Manifest, split_identities, split_sources
from deepfid.data.pairs import build_pairs, map_images
from deepfid.experiments.training_faces import merge_manifests
from deepfid.experiments.conditions import SEEN_CORRUPTIONS, UNSEEN_CORRUPTIONS, corrupted_manifests

def test_errors_for_missing_sets(tmp_path, monkeypatch):
    monkeypatch.delenv('DEEPFID_DATA', raising=False)
    with pytest.raises(DataMissingError, match='figshare'): london()
    with pytest.raises(DataMissingError, match='us-house'): portraits(tmp_path)
    (tmp_path/'portraits').mkdir()
    with pytest.raises(DataMissingError, match='436'): portraits(tmp_path)
    with pytest.raises(DataMissingError, match=r'no U.S. Congress portraits in .*jforms/images.*fetch_dataset\("congress"\)') as e: congress(tmp_path)
    assert '\n' not in str(e.value)
    (tmp_path/'congress').mkdir()
    with pytest.raises(DataMissingError, match='737'): congress(tmp_path)

def test_london_is_whole_and_consenting(data):
    people = london(data)
    assert len(people)==204 and len({s.identity for s in people})==102 and all(s.consent for s in people)
    assert sum(s.landmarks for s in people)==102 and len(london_info(data))==102
    face = people[3].load(160)
    assert face.landmarks.shape==(68, 2) and face.consent and face.image.shape==(160, 160, 3)
    assert people[103].load(160).landmarks is None

def test_landmarks_agree_with_the_detector_and_the_pupils(data):
    for s in london(data)[:6]:
        template = read_template(s.template)
        points = five_points(landmarks68(template))
        eye_distance = np.linalg.norm(points[1]-points[0])
        assert np.abs(template[:2]-points[:2]).max()<.06*eye_distance # the first two points of a template are the pupils
        assert np.abs(find_face(s.path).points-points).max()<.15*eye_distance

def test_portraits_are_only_self_blended(data, tmp_path):
    people = portraits(data)
    assert len(people)==436 and not any(s.consent or s.landmarks for s in people)
    with pytest.raises(ConsentError): forge(people[0].load(160), 'resynth', 0)
    m = build_pairs(people[:20], tmp_path/'set', pairs=(6, 2, 2), workers=1)
    assert set(m.table['method'])=={'real', 'selfblend'} and not m.table['consent'].any()
    with pytest.raises(DeepfidError, match='consent'): build_pairs(people[:20], tmp_path/'other', methods=['swap'], pairs=(6, 2, 2), workers=1)
    assert not (tmp_path/'other').exists()

def test_congress_is_only_self_blended(data, tmp_path):
    people = congress(data)
    assert len(people)==737==len({s.identity for s in people}) and {s.dataset for s in people}=={'congress'} and not any(s.consent or s.landmarks for s in people)
    assert {f'congress/{os.path.basename(s.path)}' for s in people}=={*published_files('congress')['file']}
    m = build_pairs(people[:20], tmp_path/'set', methods=['selfblend'], pairs=(6, 2, 2), workers=1)
    assert set(m.table['method'])=={'real', 'selfblend'} and not m.table['consent'].any()
    with pytest.raises(DeepfidError, match='consent'): build_pairs(people[:20], tmp_path/'other', methods=['swap'], pairs=(6, 2, 2), workers=1)

def test_originals_and_smaller_copies_give_the_same_face(data, tmp_path):
    source = next(s for s in congress(data) if cv2.imread(s.path).shape[0]==720)
    cv2.imwrite(str(tmp_path/'original.jpg'), cv2.resize(cv2.imread(source.path), None, fx=2.5, fy=2.5, interpolation=cv2.INTER_CUBIC))
    small, large = source.load(160), replace(source, path=str(tmp_path/'original.jpg')).load(160)
    assert small.identity==large.identity and np.abs(small.image.astype(float)-large.image).mean()<5

# -- one person in two sets -------------------------------------------------------------------------------------------

def test_people_of_both_sets_have_one_name(data, repo):
    with open(repo/'deepfid'/'weights'/'people.csv', newline='') as f: bioguide = {r['portrait']: r['bioguide'] for r in csv.DictReader(f)}
    assert len(bioguide)==436==len(set(bioguide.values())) and set(bioguide)=={*published_files('portraits')['file']}
    ours, theirs = ({s.identity for s in sources(data)} for sources in (portraits, congress))
    assert len(ours & theirs)==209 and len(ours | theirs)==964 # 436+737-209
    for s in congress(data):
        stem = os.path.splitext(os.path.basename(s.path))[0]
        same = [p for p, b in bioguide.items() if b==stem]
        assert s.identity==member_identity(stem)==(f'portrait-{same[0][10:14]}' if same else f'congress-{stem}')

@pytest.mark.parametrize('seed', [0, 1, 7])
def test_one_split_over_all_sets(data, seed):
    split = photograph_split(seed)
    assert len(split)==964+102 and split==photograph_split(seed)!=photograph_split(seed+1)
    sets = dict(london=london(data), portraits=portraits(data), congress=congress(data))
    for wanted in (['london'], ['portraits'], ['congress'], ['portraits', 'congress'], [*sets]): # alone or together
        sources = [s for name in wanted for s in sets[name]]
        assert split_sources(sources, seed)=={s.identity: split[s.identity] for s in sources}
    for name, sources in sets.items():
        assert {c.identity: c.split for c in read_clips(name, data, seed=seed)}=={s.identity: split[s.identity] for s in sources}
        counts = Counter(split[p] for p in {s.identity for s in sources})
        for s, share in (('train', .7), ('valid', .1), ('test', .2)): assert abs(counts[s]/sum(counts.values())-share)<.03, (name, s)

def test_splits_of_each_set_alone_are_as_they_were(data):
    for seed in (0, 1):
        split = photograph_split(seed)
        assert london_split(seed).items()<=split.items() and split_identities([s.identity for s in portraits(data)], seed=seed).items()<=split.items()

def test_a_few_photographs_still_fill_all_splits(data):
    split = photograph_split()
    few = [s for s in congress(data) if split[s.identity]=='train'][:12]
    assert Counter(split_sources(few).values())==dict(train=9, valid=1, test=2)
    strangers = [*congress(data), replace(few[0], identity='somebody', dataset='mine')]
    found = split_sources(strangers)
    assert found['somebody'] in ('train', 'valid', 'test') and all(split[p]==s for p, s in found.items() if p!='somebody')

def test_a_person_in_two_splits_is_refused_when_manifests_are_merged(data, tmp_path):
    split, other = photograph_split(0), photograph_split(1)
    both = sorted({s.identity for s in portraits(data)} & {s.identity for s in congress(data)})
    chosen = [[p for p in both if split[p]==s and other[p]==o][0] for s in ('train', 'valid', 'test') for o in ('train', 'test', 'valid')]
    def build(sources, name, seed=0):
        return build_pairs([s for s in sources(data) if s.identity in chosen], tmp_path/name, methods=['selfblend'], pairs=(3, 3, 3), size=48, seed=seed, workers=1)
    ours = build(portraits, 'portraits')
    merged = merge_manifests(dict(portraits=ours, congress=build(congress, 'congress')), tmp_path)
    assert len(merged)==36 and merged.table['identity'].nunique()==9
    assert (merged.table.groupby('identity')['dataset'].nunique()==2).all() and all(split[p]==s for p, s in zip(merged.table['identity'], merged.table['split']))
    with pytest.raises(ManifestError, match="identity 'portrait-p.*the same person is in another split too.*of dataset 'congress'") as e:
        merge_manifests(dict(portraits=ours, other=build(congress, 'other', seed=1)), tmp_path)
    assert '\n' not in str(e.value)

# -- the public sets, in miniature ----------------------------------------------------------------------------------

def touch(root, *names):
    for name in names:
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        (root/name).touch()
    return root

def splits_of_people(clips):
    "person -> splits in which they are seen, as themselves or as donors"
    seen = defaultdict(set)
    for c in clips:
        if c.split:
            for person in {c.identity, c.donor}-{''}: seen[person].add(c.split)
    return seen

def official(folder, pairs=((('000', '003'), ('071', '054')), (('720', '672'),), (('953', '974'), ('012', '026')))):
    for name, p in zip(('train', 'val', 'test'), pairs): write_json(folder/f'{name}.json', p)
    return [p for ps in pairs for p in ps]

METHODS = ('Deepfakes', 'Face2Face', 'FaceSwap', 'NeuralTextures', 'FaceShifter')

@pytest.fixture
def ff(tmp_path):
    root = tmp_path/'FaceForensics++'
    for a, b in official(root):
        for c in ('raw', 'c23', 'c40'):
            touch(root, *(f'original_sequences/youtube/{c}/videos/{v}.mp4' for v in (a, b)))
            touch(root, *(f'manipulated_sequences/{m}/{c}/videos/{v}.mp4' for m in METHODS for v in (f'{a}_{b}', f'{b}_{a}')))
        touch(root, *(f'manipulated_sequences/{m}/masks/videos/{v}.mp4' for m in METHODS[:4] for v in (f'{a}_{b}', f'{b}_{a}')))
    return root

@pytest.mark.parametrize('compression', ['raw', 'c23', 'c40'])
def test_ffpp(ff, compression):
    clips = ffpp(ff.parent, compression)
    assert len(clips)==10+5*10 and all(f'/{compression}/videos/' in c.path for c in clips)
    assert {c.video: c.split for c in clips if c.label}['720']=='valid'
    assert all(len(s)==1 for s in splits_of_people(clips).values()) # the official splits are closed under pairs
    fake = next(c for c in clips if (c.method, c.video)==('NeuralTextures', '012_026'))
    assert (fake.identity, fake.donor, fake.source, fake.split, fake.label, fake.dataset) == ('012', '026', '012', 'test', 0, f'ffpp-{compression}')
    assert fake.mask.endswith('NeuralTextures/masks/videos/012_026.mp4') and not any(c.mask for c in clips if c.method in ('real', 'FaceShifter'))
    assert count_clips(clips, 'ffpp').loc['FaceSwap'].tolist()==[1000, 10, 0]
    assert {c.method for c in ffpp(ff, compression, ['FaceSwap'])}=={'real', 'FaceSwap'} and not any(c.consent for c in clips)

def test_ffpp_errors(ff):
    with pytest.raises(DeepfidError, match="compression='c99'"): ffpp(ff, 'c99')
    official(ff, ((('000', '003'),), (('003', '672'),), ()))
    with pytest.raises(ManifestError, match="'003' is in train and valid"): ffpp(ff)
    (ff/'train.json').unlink()
    with pytest.raises(DataMissingError, match='train.json, val.json and test.json come from dataset/splits of github.com/ondyari'): ffpp(ff)
    with pytest.raises(DataMissingError, match='form at github.com/ondyari'): ffpp(ff/'nowhere')

@pytest.mark.parametrize('content', [None, 3, 'text', [1], ['ab'], [[1]], [None], {'a': 1}, {'a': {'b': {'train': [1]}}}, {'a': {'b': 1}}, {'a': {'b': {'train': {'v': {'frames': 3}}}}},
    {'a': {'b_real': {'train': {'v': 1}}}}, {'000.mp4': {}}, {'000.mp4': {'label': 'real'}}, {'000.mp4': [1]}])
def test_lists_of_another_form_are_one_line(ff, tmp_path, content):
    "As they are after an unlucky edit, or where another file was saved under the name"
    wrong, names = 'get the file again|no rows', ((('000', '003'),), (('672', '720'),), ())
    official(ff, names)
    write_json(ff/'train.json', content)
    with pytest.raises(DeepfidError, match='train.json: .*get the file again'): ffpp(ff)
    touch(tmp_path/'dfdc_preview_set', '000.mp4')
    write_json(tmp_path/'dfdc_preview_set'/'dataset.json', content)
    if isinstance(content, dict) and '000.mp4' not in content: assert dfdcp(tmp_path)==[] # names no clip that is there
    else:
        with pytest.raises(ManifestError, match='dataset.json: .*get the file again'): dfdcp(tmp_path)
    write_json(tmp_path/'bench.json', content)
    with pytest.raises(ManifestError, match=wrong): read_deepfakebench(tmp_path/'bench.json')

def test_dfd(tmp_path):
    touch(tmp_path, 'original_sequences/actors/c23/videos/01__exit_phone_room.mp4', 'original_sequences/actors/c23/videos/02__exit_phone_room.mp4',
          'manipulated_sequences/DeepFakeDetection/c23/videos/01_02__exit_phone_room__YVGY8LOK.mp4', 'manipulated_sequences/DeepFakeDetection/c23/videos/03_02__kitchen_pan__1ABCDEFG.mp4')
    clips = dfd(tmp_path)
    assert [c.source for c in clips]==['', '', '01__exit_phone_room', ''] and {c.split for c in clips}=={'test'} and clips[2].donor=='02'

@pytest.mark.parametrize('version', [1, 2])
def test_celebdf(tmp_path, version):
    root = touch(tmp_path/f'Celeb-DF-v{version}', 'Celeb-real/id0_0000.mp4', 'Celeb-real/id1_0003.mp4', 'Celeb-real/id5_0001.mp4', 'YouTube-real/00170.mp4', 'YouTube-real/00001.mp4',
                 'Celeb-synthesis/id0_id1_0000.mp4', 'Celeb-synthesis/id5_id6_0001.mp4', 'Celeb-synthesis/id7_id0_0009.mp4')
    tests = root/'List_of_testing_videos.txt'
    tests.write_text('1 YouTube-real/00170.mp4\r\n0 Celeb-synthesis/id0_id1_0000.mp4\r\n\n')
    clips = {c.video: c for c in celebdf(tmp_path, version)}
    assert {k for k, c in clips.items() if c.split=='test'}=={'00170', 'id0_id1_0000'} and clips['00170'].label==1
    assert {k for k, c in clips.items() if not c.split}=={'id0_0000', 'id1_0003', 'id7_id0_0009'} # they show people of the test list
    assert clips['id5_id6_0001'].source=='id5_0001' and clips['id0_id1_0000'].donor=='id1' and clips['id7_id0_0009'].source==''
    assert all(len(s)==1 for s in splits_of_people(clips.values()).values())
    loose = celebdf(tmp_path, version, strict=False)
    assert all(c.split for c in loose) and len({c.identity for c in loose})==len(loose)
    assert count_clips(list(clips.values()), f'celebdf-v{version}').loc['real'].tolist()==[408 if version==1 else 890, 5, 2]
    tests.write_text('0 YouTube-real/00170.mp4\n')
    with pytest.raises(ManifestError, match='1 is real and 0 is fake'): celebdf(tmp_path, version)
    tests.unlink()
    with pytest.raises(DataMissingError, match='List_of_testing_videos.txt comes with the set.*github.com/yuezunli'): celebdf(tmp_path, version)

def test_wilddeepfake_and_dfdcp(tmp_path):
    touch(tmp_path/'deepfake_in_the_wild', *(f'{p}/{a}/{p[:4]}/{s}/{f}.png' for p in ('real_train', 'real_test', 'fake_train', 'fake_test') for a in (0, 1) for s in (4, 17) for f in (3, 20)))
    clips = wilddeepfake(tmp_path)
    assert len(clips)==16 and {c.kind for c in clips}=={'crops'} and all(len(s)==1 for s in splits_of_people(clips).values())
    assert count_clips(clips, 'wilddeepfake').to_numpy().tolist()==[[3805, 8, 0], [3509, 8, 0]]
    entries = {'original_videos/1003254/1003254_A_001.mp4': dict(label='real', set='train', augmentations=[]), 'method_A/1003254/1003254_A/1255229_1003254_A_001.mp4': dict(label='fake', set='train'),
            'original_videos/1255229/1255229_C_002.mp4': dict(label='real', set='test'), 'method_B/9/9_A/8_9_A_001.mp4': dict(label='fake', set='test')}
    touch(tmp_path/'dfdc_preview_set', *list(entries)[:3])
    write_json(tmp_path/'dfdc_preview_set'/'dataset.json', entries)
    a, b, c = dfdcp(tmp_path)
    assert (b.identity, b.donor, b.source, b.label) == ('1003254', '1255229', '1003254_A_001', 0) and [a.split, b.split, c.split]==['train', '', 'test']
    assert count_clips([a, b, c], 'dfdcp').loc['fake'].tolist()==[4119, 1, 1]

def test_folder(tmp_path, monkeypatch):
    touch(tmp_path, *(f'real/p{i}.mp4' for i in range(12)), 'real/ann lee/é 1.JPG', 'fake/swap/p3.avi', 'fake/ann lee/é 1.png', 'fake/stranger.webm', 'fake/notes.txt', 'real/.hidden.mp4')
    clips = clips_from_folder(tmp_path)
    by = {(c.method, c.video): c for c in clips}
    assert len(clips)==16 and by['swap', 'swap/p3.avi'].source=='p3.mp4' and by['fake', 'ann lee/é 1.png'].source=='ann lee/é 1.JPG' and by['fake', 'stranger.webm'].source==''
    assert by['real', 'ann lee/é 1.JPG'].kind=='photo' and by['real', 'p0.mp4'].kind=='video' and {c.split for c in clips}=={'train', 'valid', 'test'}
    assert all(len(s)==1 for s in splits_of_people(clips).values()) and clips_from_folder(tmp_path)==clips and not any(c.consent for c in clips)
    touch(tmp_path/'s', 'train/real/a.jpg', 'val/real/b.jpg', 'test/fake/c.jpg', 'test/real/a.jpg')
    assert {c.video: c.split for c in clips_from_folder(tmp_path/'s')}=={'train/a.jpg': '', 'valid/b.jpg': 'valid', 'test/c.jpg': 'test', 'test/a.jpg': 'test'}
    with pytest.raises(DataMissingError, match="'real' or 'fake'"): clips_from_folder(tmp_path/'s'/'train'/'real')
    monkeypatch.setattr(os, 'access', lambda *a: False)
    with pytest.raises(DataMissingError, match='train/real: permission denied'): clips_from_folder(tmp_path/'s'/'train'/'real')

def test_names_like_those_of_faceforensics(tmp_path):
    "real/000 and fake/METHOD/000_001: the fake is 000 with the face of 001, and both stay in one split"
    n = 24
    names = [f'fake/{m}/{a:03d}_{b:03d}.jpg' for m in ('Deepfakes', 'FaceSwap') for k in range(0, n, 2) for a, b in ((k, k+1), (k+1, k))]
    touch(tmp_path, *(f'real/{i:03d}.jpg' for i in range(n)), *names, 'fake/Deepfakes/000_999.jpg', 'fake/001_000.jpg', 'fake/Deepfakes/nobody.jpg')
    clips = clips_from_folder(tmp_path)
    by = {c.video: c for c in clips}
    fake = by['Deepfakes/000_001.jpg']
    assert (fake.identity, fake.donor, fake.source, fake.method)==('000', '001', '000.jpg', 'Deepfakes')
    assert (by['001_000.jpg'].identity, by['001_000.jpg'].donor, by['001_000.jpg'].method)==('001', '000', 'fake')
    assert (by['Deepfakes/000_999.jpg'].identity, by['Deepfakes/000_999.jpg'].donor)==('000', '') # 999 is nobody
    assert all(c.split for c in clips) and {c.split for c in clips}=={'train', 'valid', 'test'} and all(len(s)==1 for s in splits_of_people(clips).values())
    text = describe_names(clips)
    assert 'people, by folder or name: 24' in text and "fakes named TARGET_DONOR: 49, such as '001_000.jpg', which is '001' with the face of '000'" in text
    assert "fakes that match nothing real by name: 1 (people that they count as, by folder or name: 1, such as 'nobody')" in text
    touch(tmp_path/'frames', *(f'{d}/{i}.png' for d in ('real/000', 'real/001', 'fake/NT/000_001') for i in (0, 1)))
    by = {c.video: c for c in clips_from_folder(tmp_path/'frames')}
    assert (by['NT/000_001/1.png'].source, by['NT/000_001/1.png'].donor)==('000/1.png', '001')

@pytest.mark.parametrize('real, fake, donor', [('person{i}', 'swap/Person{i}-person{j}', 'person{j}'), ('person{i}', 'swap/person{i}_fake', ''), ('{i:03d}', 'swap/{i:03d}_{j:03d}_v2', '{j:03d}'),
    ('id{i}_0000', 'id{i}_id{j}_0000', 'id{j}'), ('person{i}', 'swap/person{i}/1', ''), ('person{i}', 'person{i} swapped', '')])
def test_a_fake_is_of_the_person_that_its_name_begins_with(tmp_path, real, fake, donor):
    n = 12
    touch(tmp_path, *(f'real/{real.format(i=i)}.jpg' for i in range(n)), *(f'fake/{fake.format(i=i, j=(i+1)%n)}.jpg' for i in range(n)))
    clips = clips_from_folder(tmp_path)
    people, by = {c.identity for c in clips if c.label}, {c.video: c for c in clips}
    for i in range(n):
        c = by[f'{fake.format(i=i, j=(i+1)%n)}.jpg']
        assert c.identity==real.format(i=i).removesuffix('_0000') and c.donor==donor.format(j=(i+1)%n), c
    assert len(people)==n and all(len(s)==1 for s in splits_of_people(clips).values())

def test_a_method_is_no_person(tmp_path):
    touch(tmp_path, *(f'real/p{i}.jpg' for i in range(12)), *(f'fake/{m}/x{i}.jpg' for m in ('swap', 'FaceSwap') for i in range(12)), 'fake/eve/1.jpg', 'fake/p_swap/y.jpg', 'real/vid12_00012.jpg')
    by = {c.video: c for c in clips_from_folder(tmp_path)}
    assert (by['swap/x1.jpg'].identity, by['swap/x1.jpg'].method)==('x1', 'swap') and by['eve/1.jpg'].identity=='eve' and by['FaceSwap/x1.jpg'].identity=='x1' and by['vid12_00012.jpg'].identity=='vid12_00012'

def test_one_person_in_two_spellings(tmp_path):
    touch(tmp_path, 'train/real/Ann/1.jpg', 'test/real/ann/2.jpg', 'train/real/Zoe\u0301/1.jpg', 'test/real/Zo\u00e9/2.jpg', 'train/real/bob/1.jpg')
    assert {c.video: c.split for c in clips_from_folder(tmp_path)}=={'train/Ann/1.jpg': '', 'train/Zoe\u0301/1.jpg': '', 'train/bob/1.jpg': 'train', 'test/ann/2.jpg': 'test', 'test/Zo\u00e9/2.jpg': 'test'}
    touch(tmp_path/'many', *(f'real/p{i}/1.jpg' for i in range(20)), *(f'real/P{i} /2.jpg' for i in range(20)))
    clips = clips_from_folder(tmp_path/'many')
    assert len(clips)==40 and all(c.split for c in clips) and all(len({c.split for c in clips if c.identity.strip().lower()==f'p{i}'})==1 for i in range(20))

def test_listing_files_ends_with_cyclic_links(tmp_path):
    touch(tmp_path, 'a/x.mp4', 'b/y.MP4')
    (tmp_path/'a'/'up').symlink_to(tmp_path)
    (tmp_path/'c.mp4').symlink_to(tmp_path/'c.mp4')
    (tmp_path/'d').symlink_to(tmp_path/'d')
    assert [p.name for p in iter_files(tmp_path)]==['x.mp4', 'y.MP4', 'c.mp4'] and list(iter_files(tmp_path/'none'))==[]

def test_read_by_name(data):
    clips = read_clips('portraits', data)
    assert len(clips)==436 and {c.kind for c in clips}=={'photo'} and not any(c.consent for c in clips) and {c.split for c in clips}=={'train', 'valid', 'test'}
    assert all(c.consent for c in read_clips('london', data)) and not any(c.consent for c in read_clips('congress', data))
    with pytest.raises(DeepfidError, match="dataset='x'"): read_clips('x')

def write_image(path):
    "An image file that differs from any other"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image.n += 1
    cv2.imwrite(str(path), np.random.default_rng(write_image.n).integers(0, 256, (32, 32, 3), np.uint8))
write_image.n = 0

# -- DeepfakeBench's lists ------------------------------------------------------------------------------------------

def test_deepfakebench_in_and_out(tmp_path):
    def video(name, *frames, masks=()):
        for n in (*(f'f/{name}/{f}.png' for f in frames), *(f'm/{name}/{f}.png' for f in masks)): write_image(tmp_path/n)
        return dict(label='x', frames=[f'f\\{name}\\{f}.png'.replace('/', '\\') for f in frames], masks=[f'm/{name}/{f}.png' for f in masks])
    content = {'FF-DF': {'FF-real': dict(train={'c23': {'000': video('r/000', '010', '000')}, 'c40': {}}, val={'c23': {}}, test={'c23': {'001': video('r/001', '000')}}),
                      'FF-DF': dict(train={'c23': {'000_003': video('d/000_003', '000', '010', masks=['010'])}}, val={}, test={})}}
    m = read_deepfakebench(write_json(tmp_path/'FF-DF.json', content))
    assert m.table['path'].tolist()==['f/r/001/000.png', 'f/r/000/000.png', 'f/r/000/010.png', 'f/d/000_003/000.png', 'f/d/000_003/010.png']
    last = m.table.iloc[-1]
    assert (last['method'], last['mask'], last['identity'], last['donor'], last['frame'], last['split']) == ('Deepfakes', 'm/d/000_003/010.png', '000', '003', 10, 'train')
    again = read_deepfakebench(write_deepfakebench(m, tmp_path/'out.json'), compression='c23')
    same = ['label', 'identity', 'donor', 'split', 'method', 'video', 'frame']
    assert sorted(map(tuple, again.table[same].to_numpy()))==sorted(map(tuple, m.table[same].to_numpy()))

def test_photographs_are_listed_for_deepfakebench_as_videos_of_one_frame(tmp_path):
    from deepfid.testing import tiny_manifest
    m = tiny_manifest((8, 4, 4), 64)
    again = read_deepfakebench(write_deepfakebench(m, tmp_path/'list.json'))
    assert len(again)==len(m) and again.table['label'].sum()==m.table['label'].sum()
    assert {os.path.basename(p) for p in again.table['path']}=={os.path.basename(p) for p in m.table['path']}
    rows = [dict(path=f'{person}/{kind}/001.png', label=int(kind=='real'), identity=person, split=split, method='real' if kind=='real' else 'swap')
        for person, split in zip('xyz', ('train', 'valid', 'test')) for kind in ('real', 'fake')]
    for row in rows: (tmp_path/row['path']).parent.mkdir(parents=True, exist_ok=True); (tmp_path/row['path']).write_bytes(os.urandom(40))
    again = read_deepfakebench(write_deepfakebench(Manifest(pd.DataFrame(rows), tmp_path), tmp_path/'alike.json'))
    assert len(again)==6 and sorted(again.table['split'])==sorted(r['split'] for r in rows) # files of one name in several folders

def test_deepfakebench_lists_test_videos_in_training_too(tmp_path):
    for name in 'ab': write_image(tmp_path/f'{name}.png')
    entry = lambda f: dict(label='', frames=[f])
    content = {'Celeb-DF-v2': {'CelebDFv2_real': dict(train={'id0_0000': entry('a.png'), 'id1_0000': entry('b.png')}, val={'id0_0000': entry('a.png')}, test={'id0_0000': entry('a.png')})}}
    assert read_deepfakebench(write_json(tmp_path/'x.json', content)).table['split'].tolist()==['test', 'train']

def listed_with_absolute_paths(tmp_path):
    "A manifest whose images and masks are read through a list of DeepfakeBench, and a photograph beside it through `..` and a link"
    rows = []
    for video, split in (('000', 'test'), ('001', 'test'), ('002', 'train')):
        for name, label in ((f'{video}', 1), (f'{video}_{video}', 0)):
            for frame in (0, 1):
                write_image(tmp_path/'set'/f'{name}/{frame}.png')
                write_image(tmp_path/'set'/f'{name}/m{frame}.png')
                rows.append(dict(path=f'{name}/{frame}.png', mask='' if label else f'{name}/m{frame}.png', label=label, identity=video, split=split, method='real' if label else 'Deepfakes', dataset='FF-DF', video=name, frame=frame))
    m = read_deepfakebench(write_deepfakebench(Manifest(pd.DataFrame(rows), tmp_path/'set').check(), tmp_path/'elsewhere'/'FF-DF.json'))
    assert m.table['path'].str.startswith('/').all() and len(m)==12
    return m

def test_degraded_copies_are_written_inside_their_folder(tmp_path):
    "Whatever the paths of a manifest are: absolute, with `..`, through a link"
    m = listed_with_absolute_paths(tmp_path)
    (tmp_path/'link').symlink_to(tmp_path/'set')
    table = m.table.copy()
    table.loc[0, 'path'], table.loc[1, 'path'] = '../set/'+table['path'][0].split('/set/')[1], str(tmp_path/'link'/table['path'][1].split('/set/')[1])
    m = Manifest(table, tmp_path/'elsewhere').check()
    before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    inverted = map_images(m, lambda im: 255-im, tmp_path/'new'/'inverted')
    assert {p: p.read_bytes() for p in before}==before
    written = {p for p in tmp_path.rglob('*') if p.is_file()}-{*before}
    assert written and all(p.is_relative_to(tmp_path/'new'/'inverted') for p in written)
    assert inverted.table['path'].tolist()==[f'faces/{i:06d}.png' for i in range(len(m))]
    for i in range(len(m)):
        np.testing.assert_array_equal(inverted.image(i), 255-m.image(i))
        np.testing.assert_array_equal(inverted.mask(i), m.mask(i))
    assert map_images(m, lambda im: 255-im, tmp_path/'new'/'inverted').key()==inverted.key() # what is there is read again
    with pytest.raises(ManifestError, match='holds the images themselves'): map_images(m, lambda im: 255-im, m.folder)
    with pytest.raises(ManifestError, match='copies of other rows'): map_images(m.of('test').where(label=0), lambda im: im, tmp_path/'new'/'inverted')

def test_each_corruption_of_a_robustness_table_shows_other_pixels(tmp_path):
    m = listed_with_absolute_paths(tmp_path)
    corruptions = SEEN_CORRUPTIONS|UNSEEN_CORRUPTIONS
    made = corrupted_manifests(dict(own=m), tmp_path/'out', corruptions)
    pixels = [tuple(c.image(i).tobytes() for i in range(len(c))) for c in made.values()]
    assert len(made)==len(corruptions)==8 and len(set(pixels))==8
    for name, c in made.items(): np.testing.assert_array_equal(c.image(0), corruptions[name.split(', ')[1]](m.of('test').image(0)))

def test_a_list_of_deepfakebench_can_be_written_anywhere(tmp_path, monkeypatch):
    write_image(tmp_path/'set'/'a.png')
    monkeypatch.chdir(tmp_path)
    m = Manifest(pd.DataFrame([dict(path='a.png', label=1, identity='a', split='test', video='a', dataset='x')]), 'set')
    assert len(read_deepfakebench(write_deepfakebench(m, tmp_path/'lists'/'x.json')))==1

# -- downloads ------------------------------------------------------------------------------------------------

class RecordingHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_GET(self): self.server.requested.append(self.path); super().do_GET()

@contextlib.contextmanager
def served(root):
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(RecordingHandler, directory=str(root)))
    server.requested = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_port}', server.requested
    finally: server.shutdown(); server.server_close()

@pytest.mark.parametrize('name, origin', [('portraits', 'us-house'), ('congress', 'jforms/images')])
def test_fetching(tmp_path, monkeypatch, capsys, name, origin):
    base = tmp_path/'web'/datasets.REPOSITORIES[name]
    table = pd.DataFrame([dict(file=f'{name}/p{i}.jpg', path=f'x/{i}.jpg', bytes=1, sha256=hashlib.sha256(bytes([i])).hexdigest()) for i in range(5)])
    for i in range(5):
        touch(base, f'x/{i}.jpg')
        (base/f'x/{i}.jpg').write_bytes(bytes([i]))
    monkeypatch.setattr(datasets, 'published_files', lambda name: table)
    with served(tmp_path/'web') as (url, requested):
        get = lambda: fetch_dataset(name, tmp_path/'mine', url, progress=False)
        assert sorted(p.name for p in get().iterdir())==[f'p{i}.jpg' for i in range(5)] and 'public domain' in capsys.readouterr().out
        (tmp_path/f'mine/{name}/p3.jpg').unlink()
        requested.clear(); get()
        assert len(requested)==1 # only what is missing
        (tmp_path/f'mine/{name}/p3.jpg').write_bytes(b'my own')
        with pytest.raises(DataMissingError, match='left alone'): get()
        assert (tmp_path/f'mine/{name}/p3.jpg').read_bytes()==b'my own'
        (tmp_path/f'mine/{name}/p3.jpg').unlink(); (base/'x/3.jpg').write_bytes(b'corrupted')
        with pytest.raises(DataMissingError, match='by hand'): get()
        assert not (tmp_path/f'mine/{name}/p3.jpg').exists()
    with pytest.raises(DataMissingError, match=f'without a network.*{origin}') as e: fetch_dataset(name, tmp_path/'other', url, progress=False)
    assert '\n' not in str(e.value)

def test_published_files(monkeypatch):
    assert {n: len(published_files(n)) for n in datasets.REPOSITORIES}==dict(london=306, portraits=436, congress=737)
    assert published_files('london')['file'].str.endswith('.tem').sum()==102
    for n in datasets.REPOSITORIES:
        t = published_files(n)
        assert t['file'].is_unique and t['sha256'].is_unique and t['sha256'].str.fullmatch('[0-9a-f]{64}').all() and (t['bytes']>0).all()
    with pytest.raises(DataMissingError, match='given out by its owners'): fetch_dataset('ffpp')
    monkeypatch.delenv('DEEPFID_DATA', raising=False)
    with pytest.raises(DataMissingError, match='where to put'): fetch_dataset('london')

def test_congress_on_disk_is_published_or_smaller(data):
    for row in published_files('congress').iloc[::25].itertuples():
        content = (data/row.file).read_bytes()
        assert hashlib.sha256(content).hexdigest()==row.sha256 or cv2.imread(str(data/row.file)).shape[0]==720

def test_portraits_on_disk_are_the_published_files(data):
    for row in published_files('portraits').iloc[::50].itertuples(): assert hashlib.sha256((data/row.file).read_bytes()).hexdigest()==row.sha256

@pytest.mark.parametrize('shares, sizes', [((0, .3, .7), (0, 1, 4)), ((.7, .1, .2), (3, 1, 1)), ((.34, .33, .33), (3, 1, 1)), ((0, 0, 1), (0, 0, 5))])
def test_what_rounding_leaves_goes_to_the_largest_share(shares, sizes):
    from deepfid.data.manifest import SPLITS, split_identities
    found = list(split_identities('abcde', shares).values())
    assert tuple(map(found.count, SPLITS)) == sizes

def test_a_copy_that_was_edited_is_not_used_again(tmp_path):
    from deepfid.testing import tiny_manifest
    m = tiny_manifest((8, 4, 4), 64)
    copy = map_images(m, lambda image: 255-image, tmp_path/'copy')
    assert map_images(m, lambda image: 255-image, tmp_path/'copy').table.equals(copy.table)
    middle = tmp_path/'copy'/copy.table['path'][len(copy)//2]
    middle.write_bytes((tmp_path/'copy'/copy.table['path'][0]).read_bytes())
    with pytest.raises(DeepfidError, match='was changed since|copy of'): map_images(m, lambda image: 255-image, tmp_path/'copy')

def test_one_image_is_not_both_real_and_fake(tmp_path):
    from deepfid.data.manifest import Manifest
    from deepfid.testing import tiny_manifest
    m = tiny_manifest((8, 4, 4), 64)
    train = m.table.index[m.table['split']=='train']
    a, b = (next(i for i in train if m.table['label'][i]==k) for k in (1, 0))
    map_images(m, lambda image: image, tmp_path/'copy')
    table = Manifest.read(tmp_path/'copy'/'manifest.csv').table
    (tmp_path/'copy'/table['path'][b]).write_bytes((tmp_path/'copy'/table['path'][a]).read_bytes())
    with pytest.raises(DeepfidError, match='cannot be both real and fake'): Manifest.read(tmp_path/'copy'/'manifest.csv')
    table.loc[0, 'quality'] = np.inf
    with pytest.raises(DeepfidError, match='quality'): Manifest(table, tmp_path/'copy')

def test_a_list_of_test_videos_that_are_not_there(tmp_path):
    from deepfid.data.datasets import celebdf_test_videos
    for text in ('', '1 Celeb-real/id0_0000.mp4\n'):
        (tmp_path/'List_of_testing_videos.txt').write_text(text)
        with pytest.raises(DeepfidError, match='names no video that is there'): celebdf_test_videos(tmp_path)

def test_a_video_is_in_one_split(tmp_path):
    from deepfid.data.manifest import check_identities
    from deepfid.testing import tiny_manifest
    table = tiny_manifest((8, 4, 4), 64).table.copy()
    real = table.index[table['label']==1]
    a, b = (next(i for i in real if table['split'][i]==s) for s in ('train', 'test'))
    table.loc[[a, b], 'video'] = 'clip-1'
    with pytest.raises(DeepfidError, match="video 'clip-1'; but .*another split"): check_identities(table, 'the table')
    table.loc[b, 'video'] = 'clip-2'
    check_identities(table, 'the table')
