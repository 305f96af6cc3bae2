use super::*;

fn proof() -> Proof {
    use crate::control::authentication::proof::Expected;
    let status = serde_json::json!({"authenticated": true, "audiences": ["a"], "user": {
        "username": "system:serviceaccount:b:c",
        "extra": {"authentication.kubernetes.io/node-name": ["one"]}}});
    let expected = Expected {
        audience: "a".to_owned(),
        account: "b/c".parse().expect("valid"),
    };
    let status = serde_json::from_value(status).expect("a status");
    expected.proof(&status).expect("proves it")
}

fn token(claims: &str) -> Vec<u8> {
    format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(claims)).into_bytes()
}

fn in_seconds(seconds: i64) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let now = now.expect("after 1970").as_secs() as i64;
    format!("{{\"exp\":{}}}", now + seconds)
}

#[test]
fn good_answers_last_longer_than_bad_ones() {
    let mut now = Instant::now();
    let mut remembered = Remembered::default();
    let (good, bad, silent) = (token("{}"), token("[]"), token("1"));
    let of = |raw: &[u8]| fingerprint(raw);
    remembered.put(of(&good), &good, &Ok(proof()), now);
    remembered.put(of(&bad), &bad, &Err(Refusal::NotAuthenticated), now);
    remembered.put(of(&silent), &silent, &Err(Refusal::Busy), now);
    let minute = Duration::from_secs(60);
    assert_eq!(
        remembered.answer(&of(&good), minute, now),
        Some(Ok(proof()))
    );
    let refused = Some(Err(Refusal::NotAuthenticated));
    assert_eq!(remembered.answer(&of(&bad), minute, now), refused);
    // Nobody said anything about it.
    assert_eq!(remembered.answer(&of(&silent), minute, now), None);
    assert_eq!(remembered.answer(&of(b"another"), minute, now), None);

    now += REFUSED;
    assert_eq!(remembered.answer(&of(&bad), minute, now), None);
    assert!(remembered.answer(&of(&good), minute, now).is_some());
    now += minute;
    assert_eq!(remembered.answer(&of(&good), minute, now), None);
    assert!(
        remembered
            .answer(&of(&good), DURING_AN_OUTAGE, now)
            .is_some()
    );
    now += DURING_AN_OUTAGE;
    assert_eq!(remembered.answer(&of(&good), DURING_AN_OUTAGE, now), None);

    // What is refused now was good before.
    remembered.put(of(&good), &good, &Err(Refusal::NotAuthenticated), now);
    now += REFUSED;
    assert_eq!(remembered.answer(&of(&good), DURING_AN_OUTAGE, now), None);
}

#[test]
fn no_answer_outlives_its_token() {
    let now = Instant::now();
    for (claims, lives) in [
        (in_seconds(600), true),
        (in_seconds(-1), false),
        ("{}".to_owned(), true),
        ("no JSON".to_owned(), true),
        (format!("{{\"exp\":{}}}", u64::MAX), true),
    ] {
        let mut remembered = Remembered::default();
        let raw = token(&claims);
        remembered.put(fingerprint(&raw), &raw, &Ok(proof()), now);
        let answer = remembered.answer(&fingerprint(&raw), Duration::from_secs(60), now);
        assert_eq!(answer.is_some(), lives, "{claims}");
    }
}

#[test]
fn bad_tokens_do_not_drive_out_good_ones() {
    let now = Instant::now();
    let mut remembered = Remembered::default();
    let good = token("{}");
    remembered.put(fingerprint(&good), &good, &Ok(proof()), now);
    for number in 0..3 * MAX_BAD {
        let raw = token(&number.to_string());
        let refused = Err(Refusal::NotAuthenticated);
        remembered.put(fingerprint(&raw), &raw, &refused, now);
        assert!(remembered.bad.len() <= MAX_BAD);
    }
    let answer = remembered.answer(&fingerprint(&good), Duration::from_secs(60), now);
    assert_eq!(answer, Some(Ok(proof())));
    for number in 0..MAX_GOOD + 10 {
        let raw = token(&number.to_string());
        remembered.put(fingerprint(&raw), &raw, &Ok(proof()), now);
        assert!(remembered.good.len() <= MAX_GOOD);
    }
}
