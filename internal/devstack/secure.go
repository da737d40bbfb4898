package devstack

import (
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/push-manager/push-manager/internal/auth/apikey"
	"github.com/push-manager/push-manager/internal/auth/jwt"
	"github.com/push-manager/push-manager/internal/certs"
)

// The names in certificates and tokens, and of files.
const (
	trustDomain = "dev"

	controllerName = "controller-dev"
	managerID      = "push-manager-1"
	managerName    = "manager-" + managerID
	callerID       = "app"
	callerName     = "client-" + callerID
	etcdServerName = "etcd-dev"
	etcdClientName = "client-programs"

	policyFile = "policy.yaml"
	keysFile   = "api-keys.yaml"
	keyFile    = "api-key" // the key itself
	secretFile = "clients.secret"

	clientIssuer   = "dev"
	clientAudience = "clients"
	tokenValid     = 24 * time.Hour // the longest that is taken
)

// validYears is for how long certificates are made. One is renewed at a start in the second half of that: a stack runs for
// half of it at most.
const validYears = 1

// secured are the files of a stack whose connections have TLS, and whose callers and clients show who they are. A nil
// *secured is a plain stack.
type secured struct {
	certs.Folder

	etcd certs.Folder // whoever its authority has signed may write to etcd, so callers have another one
}

// openSecured makes the files of a directory that are missing, and renews certificates.
func openSecured(dir string, nodes int, now time.Time) (*secured, error) {
	f := &secured{
		Folder: certs.Folder{Path: dir, TrustDomain: trustDomain},
		etcd:   certs.Folder{Path: filepath.Join(dir, "etcd"), TrustDomain: trustDomain},
	}
	// Whoever can put an authority or a policy there before us is let in by all programs.
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if info, err := os.Stat(dir); err != nil {
		return nil, err
	} else if info.Mode().Perm()&0o022 != 0 {
		return nil, fmt.Errorf("%s: others may write there, so nothing in it can be trusted; remove it, and it is made anew", dir)
	}
	if err := os.Chmod(dir, 0o700); err != nil { //nolint:gosec // It is a directory. Of somebody else's it fails.
		return nil, err
	}
	hosts := []string{"localhost", "127.0.0.1", "::1"}
	both := certs.Request{Hosts: hosts, Server: true, Client: true}
	type certificate struct {
		name, kind, id string
		certs.Request
	}
	all := []certificate{
		{controllerName, certs.KindController, "dev", both},
		{managerName, certs.KindManager, managerID, both},
		{callerName, certs.KindClient, callerID, certs.Request{Client: true}},
	}
	for i := range nodes {
		all = append(all, certificate{"node-" + nodeID(i), certs.KindNode, nodeID(i), both})
	}
	for _, folder := range []struct {
		certs.Folder

		all []certificate
	}{{f.Folder, all}, {f.etcd, []certificate{
		{etcdServerName, "etcd", "dev", both},
		{etcdClientName, certs.KindClient, "programs", certs.Request{Client: true}},
	}}} {
		ends, half := now.AddDate(validYears, 0, 0), now.AddDate(0, 6*validYears, 0)
		// An authority that is replaced takes all its certificates along: Check does not find them good.
		if err := folder.Check("ca", half); err != nil {
			// Its key is kept here: what it may sign does no harm in a browser that trusts it.
			if err := folder.WriteAuthority("Push-Manager dev", now.AddDate(10*validYears, 0, 0), hosts...); err != nil {
				return nil, err
			}
		}
		for _, c := range folder.all {
			if folder.Check(c.name, half) == nil {
				continue
			}
			c.NotAfter = ends
			if err := folder.WriteCertificate(c.name, c.kind, c.id, c.Request); err != nil {
				return nil, err
			}
		}
	}
	if err := f.ensureCallers(); err != nil {
		return nil, err
	}
	if _, err := os.Lstat(f.File(secretFile)); errors.Is(err, fs.ErrNotExist) {
		var secret [48]byte
		_, _ = rand.Read(secret[:]) // does not fail
		if err := create(f.File(secretFile), base64.StdEncoding.EncodeToString(secret[:])+"\n"); err != nil {
			return nil, err
		}
	}
	// Beside the file that a listener may be reading: it finds the old token or the new one.
	token, err := f.token("alice", now)
	if err != nil {
		return nil, err
	}
	path := f.File("alice.token")
	if err := os.WriteFile(path+".new", []byte(token+"\n"), 0o600); err != nil {
		return nil, err
	}
	return f, os.Rename(path+".new", path)
}

// ensureCallers makes an API key and the policy, unless they are there. They belong together, and a person may have changed
// the policy: if only a part is there, it is an error.
func (f *secured) ensureCallers() error {
	missing := false
	for _, name := range []string{policyFile, keysFile, keyFile} {
		if _, err := os.Lstat(f.File(name)); errors.Is(err, fs.ErrNotExist) {
			missing = true
		} else if err != nil {
			return err
		}
	}
	if !missing {
		return nil
	}
	key, line, err := apikey.New("jobs", time.Time{}, "")
	if err != nil {
		return err
	}
	id, _, _ := strings.Cut(line, ":")
	for _, file := range []struct{ name, text string }{
		{policyFile, fmt.Sprintf(policy, trustDomain, callerID, id)}, {keysFile, line + "\n"}, {keyFile, key + "\n"},
	} {
		if err := create(f.File(file.name), file.text); errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("%w, but not all of %s, %s and %s: remove it, and all are made", err, policyFile, keysFile, keyFile)
		} else if err != nil {
			return err
		}
	}
	return nil
}

// policy has places for the trust domain, the caller's id and the id of the API key.
const policy = `# Who may call the push API, and what for. A change counts within 10 s.
version: 1
callers:
  - name: app       # everything, with the certificate
    match: [{san: "spiffe://%s/client/%s"}]
    allow: [{methods: ["*"], users: ["*"], rooms: ["*"]}]
  - name: jobs      # rooms and users but no broadcasts, and the console, with the API key
    match: [{key: "%s"}]
    allow: [{methods: [PushToRoom, PushToUser, PushToUsers, Explain, Console], users: ["*"], rooms: ["*"]}]
`

// create writes a file that is not there, for its owner alone.
func create(path, text string) error {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = file.WriteString(text)
	return errors.Join(err, file.Close())
}

// token makes a token for a client.
func (f *secured) token(user string, now time.Time) (string, error) {
	secret, err := jwt.ReadSecret(f.File(secretFile))
	if err != nil {
		return "", err
	}
	return jwt.Mint(secret, map[string]any{"iss": clientIssuer, "aud": clientAudience, "sub": user, "exp": now.Add(tokenValid).Unix()})
}

// section adds a set of files to the settings of a program.
func section(values map[string]string, name, caKey string, files certs.Files) {
	values[name+"_CERT_FILE"], values[name+"_KEY_FILE"] = files.Cert, files.Key
	if caKey != "" {
		values[name+caKey] = files.CA
	}
}

// of adds what all programs have in common to the settings of one.
func (f *secured) of(values map[string]string) map[string]string {
	values = maps.Clone(values)
	values["TRUST_DOMAIN"] = trustDomain
	section(values, "ETCD_TLS", "_CA_FILE", f.etcd.Files(etcdClientName))
	return values
}

// controller, pushManager and node add the files to the settings of a program.
func (f *secured) controller(values map[string]string) map[string]string {
	if f == nil {
		return values
	}
	values = f.of(values)
	section(values, "NODE_TLS", "_CLIENT_CA_FILE", f.Files(controllerName))
	return values
}

func (f *secured) pushManager(values map[string]string) map[string]string {
	if f == nil {
		return values
	}
	values = f.of(values)
	values["MANAGER_ID"] = managerID
	files := f.Files(managerName)
	section(values, "TLS", "_CLIENT_CA_FILE", files) // tls.client_auth is optional: a caller with an API key needs no certificate
	section(values, "LINK_TLS", "_CA_FILE", files)
	section(values, "CONTROLLER_TLS", "_CA_FILE", files)
	values["CONTROLLER_TLS_ALLOWED_SANS"] = certs.KindController + "/*" // or any node could take its place: all are on this machine
	values["AUTH_MODE"], values["AUTH_POLICY_FILE"], values["AUTH_API_KEYS_FILE"] = "required", f.File(policyFile), f.File(keysFile)
	return values
}

func (f *secured) node(id string, values map[string]string) map[string]string {
	if f == nil {
		return values
	}
	values = f.of(values)
	files := f.Files("node-" + id)
	section(values, "NODE_TLS", "_CLIENT_CA_FILE", files)
	section(values, "CONTROLLER_TLS", "_CA_FILE", files)
	values["CONTROLLER_TLS_ALLOWED_SANS"] = certs.KindController + "/*"
	section(values, "TLS", "", files)
	values["CLIENT_AUTH_MODE"] = "jwt"
	values["CLIENT_AUTH_JWT"] = fmt.Sprintf("[{issuer: %q, audience: %q, hs_secret_file: %q}]", clientIssuer, clientAudience, f.File(secretFile))
	values["PUSH_MANAGER_TLS"] = "true"
	return values
}
