use super::*;

const HEAD: &str = "apiVersion: overlay.rustyonions.io/v1alpha1\nkind: OverlayNode\n";

fn shown(text: &str) -> String {
    match documents(text, "mesh.yaml") {
        Ok(admitted) => format!("{admitted:#?}"),
        Err(errors) => errors.iter().map(|e| format!("{e}\n")).collect(),
    }
}

#[test]
fn probe() {
    for body in [
        "metadata: {name: m}\nspec: {}\n",
        "metadata: {name: m}\nspec:\n\treplicas: 3\n",
        "metadata: {name: m}\nspec:\n  replicas: 3\n\timage:\n",
        "metadata: {name: m}\nspec:\n  replicas: 3\n  replicas: 4\n",
        "metadata: {name: m}\nspec:\n  amnesia: yes\n  logging: {level: info, form: x}\n  replica: 3\n",
        "metadata: {name: m}\nspec:\n  transports:\n    tcp:\n      port: 70000\n  limits: null\n",
        "metadata: {name: M}\nspec:\n  amnesia: false\n  readiness: {shedAtPercent: 95, recoverAtPercent: 96}\n  limits: {perPeerInflight: 700}\n",
        "metadata: {name: m}\nspec:\n  gossip: {dedupe: {window: 10}}\n  drain: {delay: 11m, timeout: soon}\n  limits: {timeouts: {read: 1ms}}\n",
        "metadata: {name: m}\nspec:\n  auth: {tenants: []}\n  profile: Giga\n  replicas: '3'\n",
        "metadata: {name: m}\nspec:\n  auth: {tenants: ['0', '0', 'x']}\n  resources: {limits: {cpu: 1, memory: 0.5, x: 1Zi}}\n",
        "metadata: {name: m, label: {}}\nspec: [\n",
        "metadata: {generateName: m}\nspec: {}\n",
        "spec: {}\n",
        "metadata: {name: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa}\nspec: {transports: {tcp: {port: 9600}}}\n",
    ] {
        println!("--------\n{body}\n=> {}", shown(&format!("{HEAD}{body}")));
    }
    println!("{}", shown(""));
    println!("{}", shown("# nothing\n---\n"));
    println!("{}", shown("kind: Pod\napiVersion: v1\n---\n- a\n--- # x\napiVersion: overlay.rustyonions.io/v1\nkind: OverlayNode"));
    println!("{}", crate::api::crd_yaml().unwrap());
}
