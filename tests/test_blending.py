"Blending of published strength, neural re-rendering, Poisson swaps, and the channel that real and fake share"
from dataclasses import replace
import cv2, numpy as np, pytest
from deepfid.core import ConsentError, DeepfidError, face_region
from deepfid.data.blending import (BLEND_REGIONS, MANIPULATIONS, SELF_MANIPULATIONS, blend_images, blend_landmarks, clone_gradients, manipulate,
    pyramid_support, sample_region_mask, sbi, soften_mask)
from deepfid.data.channel import CHANNEL_STEPS, Channel, apply_history, encode_frame
from deepfid.data.forge import global_statistics, shortcut_probe
from deepfid.data.london import london_faces
from deepfid.data.pairs import CropJitter, PairStyle, allowed_methods, build_pairs
from deepfid.data.autoencoder import UPSAMPLERS, load_autoencoder, reconstruct_faces

NEW = ('sbi', 'sbi_part', 'reconstruct', 'poisson')

@pytest.fixture(scope='module')
def faces(): return london_faces(size=192, expressions='neutral')

@pytest.mark.parametrize('method', NEW)
def test_a_forgery_differs_inside_its_mask_alone_and_repeats(method, faces):
    for seed in range(6):
        donor = faces[seed+20] if method=='poisson' else None
        a, b = (manipulate(faces[seed], method, seed, donor) for _ in range(2))
        assert (a.fake==b.fake).all() and (a.mask==b.mask).all() and (a.real==b.real).all()
        assert a.real.dtype==a.fake.dtype==np.uint8 and 0<=a.mask.min()<=a.mask.max()<=1
        assert (a.fake[a.mask<1/512]==a.real[a.mask<1/512]).all()
        assert .002<(a.mask>.5).mean()<.6 and (a.fake!=a.real).any()
        assert not (manipulate(faces[seed], method, seed+1, donor).fake==a.fake).all()

def test_source_and_target_are_changed_equally_often(faces):
    altered = [(sbi(faces[k], k).real!=faces[k].image).any() for k in range(40)]
    assert 8<sum(altered)<32 # binomial, n=40, p=.5: outside once in 30,000

def test_people_without_consent_stay_themselves(faces):
    stranger = replace(faces[0], consent=False, landmarks=None)
    for method in SELF_MANIPULATIONS: assert manipulate(stranger, method, 1).method==method
    with pytest.raises(ConsentError): manipulate(replace(faces[0], consent=False), 'poisson', 1, faces[1])
    with pytest.raises(ConsentError): manipulate(faces[0], 'poisson', 1, replace(faces[1], consent=False))
    class Source: consent, landmarks = False, False
    assert allowed_methods(Source, tuple(MANIPULATIONS))==[*SELF_MANIPULATIONS] or \
        set(allowed_methods(Source, tuple(MANIPULATIONS)))==set(SELF_MANIPULATIONS)

@pytest.mark.parametrize('call, words', [
    (lambda f: manipulate(f, 'nothing'), 'nothing'), (lambda f: manipulate(f, 'poisson', 1), 'donor'),
    (lambda f: blend_landmarks(replace(f, landmarks=None, points=None)), 'five points'),
    (lambda f: blend_images(f.image, f.image, np.zeros((192, 192)), 'magic'), 'magic'),
    (lambda f: Channel(crf=(18, 99)), 'crf'), (lambda f: Channel(video=2), 'video'),
    (lambda f: encode_frame(f.image, 60), 'crf')])
def test_bad_input_is_one_line(call, words, faces):
    with pytest.raises(DeepfidError) as e: call(faces[0])
    assert words in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('region', BLEND_REGIONS)
def test_each_region_lies_on_the_face(region, faces):
    rng = np.random.default_rng(0)
    mask = sample_region_mask(faces[0].landmarks, region, (192, 192), rng)
    x, y = faces[0].landmarks.mean(0)
    assert 0<mask.mean()<.5
    where = np.argwhere(mask>0).mean(0)
    assert np.hypot(where[0]-y, where[1]-x)<60
    soft = soften_mask(mask, 40, rng)
    assert 0<=soft.min() and soft.max()<=1+1e-6

def test_a_clone_of_itself_is_itself_and_nothing_changes_outside(faces):
    "Wherever the region lies: a patch that is put in a pixel aside leaves a seam on one side"
    image = faces[0].image
    for height, width in ((40, 41), (41, 40), (40, 40), (41, 41)):
        inside = np.zeros(image.shape[:2], bool); inside[60:60+height, 50:50+width] = True
        for mixed in (False, True):
            assert np.abs(clone_gradients(image, image, inside, mixed)-image).max()<1e-3
            other = clone_gradients(faces[1].image, image, inside, mixed)
            assert np.array_equal(other[~inside], np.float32(image)[~inside])
    brighter = np.clip(image.astype(np.float32)*.5+60, 0, 255)
    same = clone_gradients(brighter+40, brighter, inside)
    assert np.abs(same-brighter).max()<1e-2 # gradients alone are taken, and the colour is that of the surroundings
    assert np.array_equal(clone_gradients(image, image*0, inside & False), np.zeros_like(image, np.float32))

def test_a_pyramid_ends_where_its_mask_does(faces):
    "Bands are blended further than the mask: cut off there, they would leave a line around it"
    image = faces[0].image.astype(np.float32)
    inside = np.zeros(image.shape[:2], np.float32); inside[60:120, 60:120] = 1
    mask = cv2.GaussianBlur(inside, (0, 0), 1)
    changed = np.abs(blend_images(np.clip(image+20, 0, 255), image, mask, 'pyramid')-image).max(2)
    assert changed[mask<1/512].max()>2 and changed[pyramid_support(mask)<1/512].max()<.5


@pytest.mark.parametrize('how', ['alpha', 'linear', 'lab', 'pyramid'])
def test_blends_keep_source_inside_and_target_outside(how, faces):
    a, b = (f.image.astype(np.float32) for f in faces[:2])
    mask = np.zeros((192, 192), np.float32)
    mask[48:144, 48:144] = 1
    out = blend_images(a, b, mask, how)
    tolerance = 25 if how=='pyramid' else 2 # bands are blended smoothly
    assert np.abs(out-a)[90:100, 90:100].mean()<tolerance and np.abs(out-b)[:8].mean()<tolerance
    assert np.abs(blend_images(b, b, mask, how)-b).mean()<1.5 # nothing to see where both are the same

def test_autoencoder_gives_the_same_face_back(faces):
    size = 96
    tight = np.stack([np.ascontiguousarray(f.image[36:156, 36:156]) for f in london_faces(size=192, split='test')[:12]])
    import cv2
    small = np.stack([cv2.resize(f, (size, size), interpolation=cv2.INTER_AREA) for f in tight])
    for kind in UPSAMPLERS:
        made = reconstruct_faces(small, kind)
        error = np.abs(made.astype(float)-small).mean((1, 2, 3))
        others = np.abs(made.astype(float)-np.roll(small, 1, 0)).mean((1, 2, 3))
        assert (error<others).all() and error.mean()<20 # nearer to the person than to another one
        assert error.mean()>1 # and not a copy
    assert sum(p.numel() for p in load_autoencoder().parameters())*2<4e6 # bytes in 16 bits

def test_a_channel_treats_real_and_fake_alike_and_sees_all_sizes():
    channel, rng, sides, names = Channel(), np.random.default_rng(0), [], set()
    for _ in range(300):
        steps = channel.sample_steps(rng, 200)
        names |= {n for n, _ in steps}
        sides.append(200*dict(steps)['resize']['scale'])
    assert names==set(CHANNEL_STEPS) and min(sides)<65 and max(sides)>180
    image = london_faces(size=128)[0].image
    for seed in range(20):
        steps = channel.sample_steps(np.random.default_rng(seed), 80)
        assert (apply_history(image, steps)==apply_history(image.copy(), steps)).all()

class Sources:
    def __init__(self, face): self.face, self.identity, self.dataset, self.consent, self.landmarks = face, face.identity, 'london', True, True
    def load(self, size):
        import cv2
        k = size/len(self.face.image)
        return replace(self.face, image=cv2.resize(self.face.image, (size, size)), landmarks=(self.face.landmarks+.5)*k-.5, points=None,
            region=None, meta=dict(box_side=size/1.6))

def test_pairs_through_the_channel_have_no_shortcut(tmp_path, faces):
    made = build_pairs([Sources(f) for f in faces], tmp_path/'pairs', ('sbi', 'sbi', 'sbi_part', 'reconstruct'), (420, 0, 120), size=96,
        align='box', channel=Channel(), jitter=CropJitter(), workers=1)
    assert set(made.table['method'])=={'real', 'sbi', 'sbi_part', 'reconstruct'}
    assert all(made.mask(i).shape==(96, 96) for i in range(1, 20, 2))
    def statistics(i): return global_statistics(made.image(i), face_region(replace(faces[0], image=made.image(i), landmarks=None, points=None,
        region=np.pad(np.ones((48, 48), np.float32), 24))))
    stats = np.stack([statistics(i) for i in range(len(made))]).reshape(-1, 2, 17)
    probe = shortcut_probe(stats[:, 0], stats[:, 1], (made.table['split']=='train').to_numpy()[::2])
    assert probe['low']<=.62, probe # the bound of the five forgers of `deepfid.data.forge`

def test_a_style_that_leaves_photographs_untouched(faces):
    style = PairStyle(96, align='box', untouched=True)
    face = Sources(faces[0]).load(160)
    matrix = style.crop_matrix(face, 'test', np.random.default_rng(0))
    side = 96/matrix[0, 0]
    assert abs(side-1.3*100)<1e-6 and abs(matrix[:, :2]@[79.5, 79.5]+matrix[:, 2]-48).max()<.6
    assert style.photograph(face.image, matrix, 0, [])==style.photograph(face.image, matrix, 1, [])

@pytest.mark.parametrize('n_sources', [4, 9, 24, 144]) # one less than a multiple of five, and not
def test_a_face_gets_another_manipulation_in_each_round(n_sources):
    from deepfid.data.pairs import plan_pairs, synthetic_sources
    sources, methods = synthetic_sources(n_sources, 1), ('resynth', 'mouth', 'selfblend', 'swap', 'reenact')
    plans = plan_pairs(sources, 'train', 5*n_sources, methods)
    for source in sources: assert {p.method for p in plans if p.source is source} == set(methods)
    for turn in range(5): # and in each round all are in use
        used = [p.method for p in plans[turn*n_sources:(turn+1)*n_sources]]
        assert max(map(used.count, methods))-min(map(used.count, methods)) <= 1

def test_a_face_of_nobody_else_cannot_be_put_in():
    from deepfid.data.pairs import plan_pairs, synthetic_sources
    with pytest.raises(DeepfidError, match='second person'): plan_pairs(synthetic_sources(1, 2), 'valid', 2, ('swap',))
    assert {p.method for p in plan_pairs(synthetic_sources(1, 2), 'valid', 6, ('swap', 'mouth'))} == {'mouth'}
    donors = {p.donor.identity for p in plan_pairs(synthetic_sources(2, 20), 'test', 60, ('swap',))} # many images of one person
    assert len(donors) == 2
